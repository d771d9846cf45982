"""append_kv of CUDA modules: what it launches and writes, bad slots, and bad calls before anything is launched."""

from __future__ import annotations

import re

import numpy as np
import pytest
from dlpack import CUDA, READ_ONLY, Exported, Legacy
from inputs import DTYPES
from test_append import Call
from test_cuda_errors import SPEC, at, on_device, with_strides
from tolerances import assert_same_bits


class AppendOnGpu:
    """A call of append_kv on a GPU, and what it has to write."""

    def __init__(self, gpu, spec, num_tokens):
        self.call = Call(spec, num_tokens)
        names = ("key", "value", "key_cache", "value_cache", "slot_mapping")
        pairs = zip(names, self.call.arguments, strict=True)
        self.tensors = {name: gpu.tensor(array, writable=name.endswith("cache")) for name, array in pairs}

    def append(self, module, **others):
        module.append_kv(**self.tensors | others)

    @property
    def caches(self):
        return self.tensors["key_cache"].array.copy(), self.tensors["value_cache"].array.copy()

    def check(self):
        self.call.check(*self.caches)


@pytest.mark.parametrize("check", ["host", "device", "none"])
def test_append(gpu, gpu_module, check):
    call = AppendOnGpu(gpu, SPEC, 37)
    gpu.log()
    call.append(gpu_module(SPEC), check=check)
    gpu.run()
    call.check()
    launches = ["cuda_check_slots"] * (check == "device") + ["cuda_append_kv"]
    assert [f"cuda_{name}" for name in gpu.launches()] == launches


def test_append_of_nothing(gpu, gpu_module):
    module = gpu_module(SPEC)
    AppendOnGpu(gpu, SPEC, 3).append(module)
    gpu.run()
    gpu.log()
    AppendOnGpu(gpu, SPEC, 0).append(module)
    assert gpu.log() == []


@pytest.mark.parametrize("slot", [-2, 7 * 16, 1 << 40])
@pytest.mark.parametrize("check", ["host", "device"])
def test_bad_slots(gpu, gpu_module, slot, check):
    module = gpu_module(SPEC)
    call = AppendOnGpu(gpu, SPEC, 20)
    call.tensors["slot_mapping"].array[[6, 11]] = slot
    before = call.caches
    message = rf"^slot_mapping: expected -1 or a slot in \[0, 112\), got {slot} for token 6"
    if check == "host":
        with pytest.raises(IndexError, match=message + "$"):
            call.append(module, check="host")
    else:
        call.append(module)
        gpu.run()
        with pytest.raises(IndexError, match=message + " in an earlier call, which wrote nothing$"):
            call.append(module)
    gpu.run()
    for now, then in zip(call.caches, before, strict=True):
        assert_same_bits(now, then)


BAD_APPEND = [
    ("key_at_8", "key", "aligned to 16 bytes, got an address 8 past", lambda c: on_device(at(c.key, 8))),
    ("value_strides", "value", "multiples of 8 elements (16 bytes), got [132, 66, 1]",
     lambda c: on_device(with_strides(c.value, 132, 66, 1))),
    ("cache_at_4", "value_cache", "aligned to 16 bytes, got an address 4 past",
     lambda c: on_device(at(c.value_cache, 4))),
    ("device", "slot_mapping", "on CUDA device 0, where key is, got one on device 1",
     lambda c: on_device(c.slot_mapping, 1)),
    ("no_memory", "value", "expected an array with memory, got one without",
     lambda c: Exported(c.value, device=CUDA, address=0)),
    ("read_only", "key_cache", "expected a writable array, got a read-only one",
     lambda c: Exported(c.key_cache, device=CUDA, flags=READ_ONLY)),
    ("not_known_to_be_writable", "value_cache", "expected an array that is known to be writable",
     lambda c: Legacy(c.value_cache, device=CUDA)),
    ("numpy", "slot_mapping", "CUDA memory (device type 2), got device type 1", lambda c: c.slot_mapping),
    ("check", "check", "expected one of host, device, none, got None_", lambda c: "None_"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "words", "change"), [row[1:] for row in BAD_APPEND], ids=[r[0] for r in BAD_APPEND]
)
def test_append_refuses(gpu, gpu_module, argument, words, change):
    module = gpu_module(SPEC)
    call = AppendOnGpu(gpu, SPEC, 5)
    gpu.log()
    with pytest.raises(ValueError, match=rf"^{argument}: .*{re.escape(words.replace('None_', repr('None_')))}"):
        call.append(module, **{argument: change(call.call)})
    assert gpu.log() == []


def test_int32_slots(gpu, gpu_module):
    call = AppendOnGpu(gpu, SPEC, 5)
    with pytest.raises(TypeError, match=r"^slot_mapping: expected dtype int64, got int32$"):
        call.append(gpu_module(SPEC), slot_mapping=on_device(call.call.slot_mapping.astype(np.int32)))


class Pages:
    """Caches in one storage, of which block u of the values is block u + 1 of the keys."""

    def __init__(self, gpu, tokens):
        rng = np.random.default_rng(0)
        self.new = (rng.random((2, tokens, 2, 64)) + 1).astype(DTYPES["bfloat16"])
        self.storage = gpu.tensor(np.zeros((8, 16, 2, 64), self.new.dtype))
        self.caches = [on_device(self.storage.array[begin : begin + 7]) for begin in (0, 1)]
        self._gpu, self._tokens = gpu, [gpu.tensor(array) for array in self.new]

    def append(self, module, slots, check):
        module.append_kv(*self._tokens, *self.caches, self._gpu.tensor(np.array(slots)), check=check)
        self._gpu.run()


@pytest.mark.parametrize("check", ["host", "none"])
def test_append_into_shared_pages(gpu, gpu_module, check):
    """Where no slot is one of both, or nobody is to look."""
    pages = Pages(gpu, 3)
    pages.append(gpu_module(SPEC), [0, -1, 5 * 16 + 3], check)
    expected = np.zeros_like(pages.storage.array)
    expected[0, 0], expected[5, 3] = pages.new[0, 0], pages.new[0, 2]
    expected[1, 0], expected[6, 3] = pages.new[1, 0], pages.new[1, 2]
    assert_same_bits(pages.storage.array, expected)


@pytest.mark.parametrize(
    ("check", "slots", "words"),
    [
        ("host", [0, 16, 3], "in all slots that are written, got slot 0 in the place of key_cache's slot 16"),
        ("device", [0, -1, 3], "got blocks that they share"),
        (None, [0, -1, 3], "check 'host' looks at"),
    ],
)
def test_shared_pages_are_refused(gpu, gpu_module, check, slots, words):
    pages = Pages(gpu, 3)
    with pytest.raises(ValueError, match=rf"^value_cache: expected memory apart from key_cache's.*{words}"):
        pages.append(gpu_module(SPEC), slots, check)
    gpu.run()
    assert not pages.storage.array.any()
