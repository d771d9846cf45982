"""What is written must be known to be writable, whatever library it is of; what is read need not be."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import tvm_ffi
from dlpack import COPIED, READ_ONLY, Exported, Legacy
from refusals import SPEC, append_call, assert_refused, decode_call
from tolerances import assert_same_bits

CALLS = {"decode": decode_call, "append_kv": append_call}
WRITTEN = [("decode", "out"), ("decode", "lse"), ("append_kv", "key_cache"), ("append_kv", "value_cache")]
every_written = pytest.mark.parametrize(("function", "argument"), WRITTEN, ids=[argument for _, argument in WRITTEN])


class Refuses(Exported):
    """Lends its memory to nobody."""

    def __dlpack__(self, **_):
        raise BufferError("it is lent")


class OnlyVersioned(Exported):
    """Of a library that hands read-only memory only to who can be told that it is."""

    def __dlpack__(self, *, max_version=None, **_):
        if max_version is None:
            raise BufferError("readonly is not known to DLPack before 1.0")
        return super().__dlpack__(max_version=max_version)


KINDS = {  # error, what the message shows, what is given
    "without_versions": (ValueError, "writable dlpack.Legacy", Legacy),
    "version_0": (ValueError, "writable dlpack.Exported", lambda array: Exported(array, major=0)),
    "read_only": (ValueError, "writable read-only", lambda array: Exported(array, flags=READ_ONLY)),
    "a_copy": (ValueError, "copy memory", lambda array: Exported(array, flags=COPIED)),
    "version_2": (ValueError, "DLPack 1 2.0", lambda array: Exported(array, major=2)),
    "refuses": (TypeError, "DLPack lent", Refuses),
    "a_list": (TypeError, "DLPack list", lambda array: array.tolist()),
}


@pytest.mark.scorecard(13)
@every_written
@pytest.mark.parametrize(("error", "shows", "change"), KINDS.values(), ids=KINDS)
def test_refused_before_anything_is_written(compiled, figure, function, argument, error, shows, change):
    good = vars(CALLS[function]())
    call = {**good, argument: change(good[argument])}
    method = getattr(compiled(SPEC), function)
    assert_refused(lambda: method(**call), error, argument, shows, good.values())
    figure("kinds", 1)


@every_written
@pytest.mark.parametrize("change", [Exported, tvm_ffi.from_dlpack], ids=["dlpack_1", "tvm_ffi"])
def test_written(compiled, function, argument, change):
    module, good, call = compiled(SPEC), vars(CALLS[function]()), vars(CALLS[function]())
    getattr(module, function)(**good)
    getattr(module, function)(**call | {argument: change(call[argument])})
    assert_same_bits(call[argument], good[argument])


READ = [(function, name) for function, make in CALLS.items() for name in vars(make()) if name != "scale"]
READ = [pair for pair in READ if pair not in WRITTEN]


@pytest.mark.parametrize(
    "export", [Legacy, lambda array: OnlyVersioned(array, flags=READ_ONLY)], ids=["legacy", "locked"]
)
@pytest.mark.parametrize(("function", "argument"), READ, ids=[".".join(pair) for pair in READ])
def test_what_is_only_read_may_be_read_only(compiled, function, argument, export):
    module, good, call = compiled(SPEC), vars(CALLS[function]()), vars(CALLS[function]())
    getattr(module, function)(**good)
    getattr(module, function)(**call | {argument: export(call[argument])})
    for name in ("out", "lse", "key_cache", "value_cache"):
        if name in good:
            assert_same_bits(call[name], good[name])


@pytest.mark.parametrize("number", range(5))
def test_memory_at_low_addresses(compiled, number):
    """Where a program that is not position independent has its heap, and a view of freed memory seems to be."""
    good = decode_call()
    expected = compiled(SPEC).decode(**vars(decode_call()))
    name = ("query", "key_cache", "value_cache", "block_table", "context_lens")[number]
    array = getattr(good, name)
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = system.mmap(0x10_0000_0000, 1 << 20, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
    assert 1 << 16 <= address < 1 << 40
    try:
        low = np.frombuffer((ctypes.c_char * array.nbytes).from_address(address), array.dtype).reshape(array.shape)
        low[...] = array
        found = compiled(SPEC).decode(**vars(good) | {name: low})
    finally:
        system.munmap(ctypes.c_void_p(address), ctypes.c_size_t(1 << 20))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
