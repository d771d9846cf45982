"""Bad arguments of a bundle's calls get the words of the Python module, and nothing is written."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import test_append_errors
import test_attend_errors
import test_errors
from bundles import SPECS, kernels, target_names
from c_calls import ARGS, DTYPES, Error, Item, check, of_dlpack, tensors
from dlpack import Exported
from refusals import SPEC, append_call, bytes_of, decode_call

from pa_compiler.runtime.entry_points import EntryPoint

TABLES = {
    "decode": (test_errors.BAD, decode_call),
    "attend": (test_attend_errors.BAD, test_attend_errors.good_call),
    "append_kv": (test_append_errors.BAD, append_call),
}
LEAST = 190
"""Kinds of bad arguments that C has too. It has no lists, masks, read-only arrays, GPUs or types of other libraries."""


def in_c(value):
    """Whether C has such an argument."""
    if isinstance(value, Exported):
        return of_dlpack(value) is not None
    if type(value) is np.ndarray:
        fits = all(stride % value.itemsize == 0 for stride in value.strides) and value.dtype.isnative
        return fits and str(value.dtype) in DTYPES and value.flags.writeable
    return value is None or type(value) is float


CASES = [
    pytest.param(call, good, error, argument, change, id=f"{call}-{name}")
    for call, (table, good) in TABLES.items()
    for name, error, argument, _, change in table
]


def changed_call(good, argument, change):
    call = good()
    changed = change(call)
    changed = changed if isinstance(changed, dict) else {argument: changed}
    return {**vars(call), **changed}


def is_in_c(call):
    """Whether C has such a call: without those arguments that are Python's alone."""
    return not {"check", "inputs"} & call.keys() and all(
        name == "causal" or (in_c(value) and (name != "scale" or not isinstance(value, np.ndarray)))
        for name, value in call.items()
    )


def message(call, arguments, error):
    with pytest.raises(error) as caught:
        call(**arguments)
    return str(caught.value)


@pytest.fixture
def of_c(bundle, monkeypatch):
    return kernels(bundle, target_names(bundle)[1], "float16", monkeypatch)


@pytest.mark.parametrize(("call", "good", "error", "argument", "change"), CASES)
def test_the_words_are_the_same(compiled, of_c, monkeypatch, call, good, error, argument, change):
    """Of the module's, or of its library's where Python has words of its own, for arrays that no C has."""
    arguments = changed_call(good, argument, change)
    if not is_in_c(arguments):
        pytest.skip("C has no such argument")
    module = compiled(SPEC, attend=True)
    before = bytes_of(arguments.values())
    in_python = message(getattr(module, call), arguments, error)
    monkeypatch.setattr(EntryPoint, "_check_kinds", lambda self, arrays: None)
    of_library = message(getattr(module, call), arguments, error)
    assert message(getattr(of_c, call), arguments, error) in (in_python, of_library)
    assert bytes_of(arguments.values()) == before


def test_there_are_as_many_as_are_promised():
    found = [
        is_in_c(changed_call(good, argument, change))
        for table, good in TABLES.values()
        for _, _, argument, _, change in table
    ]
    assert sum(found) >= LEAST


def test_arrays_that_a_spec_has_or_has_not(bundle, monkeypatch):
    isa = target_names(bundle)[1]
    scored, codes = (kernels(bundle, isa, name, monkeypatch) for name in ("scored", "codes_and_a_function"))
    call = dict(zip(("query", "key_cache", "value_cache", "block_table", "context_lens"), _small(), strict=True))
    with pytest.raises(TypeError, match=r"^alibi_slopes: expected an array, got none$"):
        scored.decode(**call, sinks=np.zeros(6, np.float32))
    with pytest.raises(TypeError, match=r"^inputs: expected 1 arrays, those of the spec, got 0 and NULL$"):
        codes.decode(**call)
    with pytest.raises(TypeError, match=r"^sinks: expected None, since the spec has no sinks, got an array of shape"):
        kernels(bundle, isa, "float32", monkeypatch).decode(**call, sinks=np.zeros(6, np.float32))


def _small():
    cache = np.zeros((2, 5, 2, 24), np.float32)
    return np.zeros((1, 6, 24), np.float32), cache, cache, np.zeros((1, 1), np.int32), np.ones(1, np.int32)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_threads": -1}, ValueError, r"^num_threads: expected a number from 0 on, got -1$"),
        ({"threading": 3}, ValueError, r"threading: expected 0 to 2, got 3"),
        ({"threading": -1}, ValueError, r"threading: expected 0 to 2, got -1"),
        (
            {"cpus": (ctypes.c_int32 * 2)(1, 0), "num_cpus": 2},
            ValueError,
            r"cpus: expected .* ascending, got 0 at .* 1",
        ),
        (
            {"cpus": (ctypes.c_int32 * 1)(1 << 16), "num_cpus": 1},
            ValueError,
            r"^cpus: expected numbers from 0 to 65535, ascending, got 65536 at position 0$",
        ),
        ({"num_cpus": 3}, ValueError, r"^cpus: expected num_cpus numbers, 3, got NULL$"),
        ({"num_cpus": -1}, ValueError, r"^cpus: expected num_cpus numbers, -1, got NULL$"),
        ({"workspace_size": 64}, ValueError, r"^workspace: expected memory of workspace_size bytes, 64, got NULL$"),
        ({"cpus": (ctypes.c_int32 * 1)(-1), "num_cpus": 1}, ValueError, r"cpus: expected .* got -1 at position 0"),
        ({"cpus": (ctypes.c_int32 * 1)(0), "num_cpus": 0}, ValueError, r"cpus: expected one CPU at least, got 0"),
        ({"workspace": 8, "workspace_size": 1 << 30}, ValueError, r"workspace: expected .* multiple of 64, got 0x8"),
    ],
)
def test_bad_options(bundle, monkeypatch, options, error, says):
    with pytest.raises(error, match=says):
        kernels(bundle, target_names(bundle)[1], "float32", monkeypatch, **options).decode(*_small())


@pytest.mark.parametrize("size", [0, 64, 4096])
def test_a_workspace_that_is_too_small(bundle, monkeypatch, size):
    memory = (ctypes.c_char * (size + 64))()
    address = -(-ctypes.addressof(memory) // 64) * 64
    given = kernels(
        bundle, target_names(bundle)[1], "float32", monkeypatch, workspace=address, workspace_size=size, num_threads=1
    )
    out = np.full((1, 6, 24), np.nan, np.float32)
    with pytest.raises(ValueError, match=rf"^workspace: expected as many bytes as .*, got {size}$"):
        given.decode(*_small(), out=out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("starts", [None, np.array([0, 9])], ids=["decode", "attend"])
def test_a_plan_writes_nothing_before_all_is_checked(of_c, starts):
    args = tensors(ARGS["plan"](), {"context_lens": np.array([9]), "query_start_loc": starts})
    items, count, error = (Item * 4)(), ctypes.c_int64(-5), Error()

    def plan(count):
        words = (of_c.pointer, ctypes.byref(args), items, ctypes.c_int64(4), count, ctypes.byref(error))
        check(of_c.library.c.pa_plan(*words), error)

    with pytest.raises(TypeError, match=r"^count: expected a pointer, got NULL$"):
        plan(None)
    args.num_threads = -1
    with pytest.raises(ValueError, match=r"^num_threads: expected a number from 0 on, got -1$"):
        plan(ctypes.byref(count))
    assert count.value == -5
    assert bytes(items) == bytes(ctypes.sizeof(items))


def test_bad_structs(of_c):
    error, args = Error(), ctypes.c_void_p()
    c = of_c.library.c
    with pytest.raises(TypeError, match=r"^kernels: expected a pointer, got NULL$"):
        check(c.pa_decode(None, None, None, ctypes.byref(error)), error)
    with pytest.raises(TypeError, match=r"^args: expected a pointer, got NULL$"):
        check(c.pa_decode(of_c.pointer, None, None, ctypes.byref(error)), error)
    with pytest.raises(ValueError, match=r"^name: expected a spec of this bundle, one of f32_.*, got x$"):
        check(c.pa_find(b"x", ctypes.byref(args), ctypes.byref(error)), error)
    with pytest.raises(TypeError, match=r"^name: expected a pointer"):
        check(c.pa_find(None, ctypes.byref(args), ctypes.byref(error)), error)
    assert c.pa_find(b"x", ctypes.byref(args), None) == 2
    assert c.pa_name(ctypes.c_int64(-1)) is c.pa_name(ctypes.c_int64(len(SPECS))) is None
    assert c.pa_kernels_name(None) is None


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"rank": -1}, ValueError, r"^context_lens: expected a rank from 0 to 8, .* got rank -1$"),
        ({"rank": 9}, ValueError, r"^context_lens: expected a rank from 0 to 8, .* got rank 9$"),
        ({"rank": 2**31 - 1}, ValueError, r"^context_lens: expected a rank from 0 to 8, .* got rank 2147483647$"),
        ({"shape": (ctypes.c_int64 * 1)(2**63 - 1)}, ValueError, r"^context_lens: expected bytes that fit in an .*"),
        ({"shape": None}, ValueError, r"^context_lens: expected a rank .* got rank 1 and no shape$"),
        ({"shape": (ctypes.c_int64 * 1)(-2)}, ValueError, r"^context_lens: expected extents from 0 on, got \[-2\]$"),
        ({"dtype": 16}, TypeError, r"^context_lens: expected a pa_dtype, got 16$"),
        ({"dtype": -1}, TypeError, r"^context_lens: expected a pa_dtype, got -1$"),
        ({"dtype": 0}, TypeError, r"^context_lens: expected an array, got none$"),
        ({"data": None}, ValueError, r"^context_lens: expected an array with memory"),
    ],
)
def test_bad_tensors(of_c, fields, error, says):
    args = tensors(ARGS["plan"](), {"context_lens": np.ones(1, np.int32)})
    for name, value in fields.items():
        setattr(args.context_lens, name, value)
    count, words = ctypes.c_int64(), Error()
    with pytest.raises(error, match=says):
        check(
            of_c.library.c.pa_plan(
                of_c.pointer, ctypes.byref(args), None, ctypes.c_int64(0), ctypes.byref(count), ctypes.byref(words)
            ),
            words,
        )
    with pytest.raises(ValueError, match=r"^items: expected room for capacity items, got none and 3$"):
        check(
            of_c.library.c.pa_plan(
                of_c.pointer, ctypes.byref(args), None, ctypes.c_int64(3), ctypes.byref(count), ctypes.byref(words)
            ),
            words,
        )
