"""Bad calls of CUDA modules: the argument, what was expected and what came, before anything is launched."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_driver import OnGpu, stream
from dlpack import CUDA, Exported
from inputs import make_inputs
from numpy.lib.stride_tricks import as_strided
from test_append import Call
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec

SPEC = PagedAttentionSpec(8, 2, 64, 16, "bfloat16")
LENGTHS = [20, 0, 5]

V, T = ValueError, TypeError


def at(array, offset):
    """The memory of an array, so many bytes later."""
    room = np.zeros(array.nbytes + 512, np.uint8)
    start = -room.ctypes.data % 256 + offset
    return room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)


def with_strides(array, *strides):
    """An array of the same shape with strides in elements."""
    reach = sum((extent - 1) * stride for extent, stride in zip(array.shape, strides, strict=True)) + 1
    room = at(np.zeros(reach, array.dtype), 0)
    return as_strided(room, array.shape, [stride * array.itemsize for stride in strides])


def on_device(array, device_id=0):
    return Exported(array, device=CUDA, device_id=device_id)


# id, error, the argument at fault, the message's words, what is given in place of it: from the inputs of a good call
BAD = [
    ("rank", V, "query", "expected shape [batch, 8, 64], got [8, 64]", lambda i: on_device(i.query[0])),
    ("dtype", T, "query", "expected dtype bfloat16, got float32", lambda i: on_device(i.query.astype(np.float32))),
    ("cpu", V, "query", "an array in CUDA memory (device type 2), got device type 1", lambda i: Exported(i.query)),
    ("numpy", V, "query", "an array in CUDA memory (device type 2), got device type 1", lambda i: i.query),
    ("numpy_table", V, "block_table", "CUDA memory (device type 2), got device type 1", lambda i: i.block_table),
    ("list", T, "context_lens", "expected an array with DLPack, got list", lambda i: i.context_lens.tolist()),
    ("none", T, "key_cache", "expected an array with DLPack, got NoneType", lambda i: None),
    ("stride", V, "query", "a contiguous last axis (stride 1), got stride 2",
     lambda i: on_device(np.repeat(i.query, 2, -1)[..., ::2])),
    ("query_at_2", V, "query", "aligned to 4 bytes, got an address 2 past", lambda i: on_device(at(i.query, 2))),
    ("query_strides", V, "query", "strides in multiples of 2 elements (4 bytes), got [520, 65, 1]",
     lambda i: on_device(with_strides(i.query, 520, 65, 1))),
    ("key_at_8", V, "key_cache", "aligned to 16 bytes, got an address 8 past", lambda i: on_device(at(i.key_cache, 8))),
    ("value_at_2", V, "value_cache", "aligned to 16 bytes, got an address 2 past",
     lambda i: on_device(at(i.value_cache, 2))),
    ("key_strides", V, "key_cache", "strides in multiples of 8 elements (16 bytes), got [2176, 136, 68, 1]",
     lambda i: on_device(with_strides(i.key_cache, 2176, 136, 68, 1))),
    ("shape_of_value", V, "value_cache", "expected as many blocks as key_cache, 6, got 5",
     lambda i: on_device(i.value_cache[1:])),
    ("other_device", V, "block_table", "on CUDA device 0, where query is, got one on device 1",
     lambda i: on_device(i.block_table, 1)),
    ("other_device_of_out", V, "out", "on CUDA device 0, where query is, got one on device 1",
     lambda i: on_device(i.out, 1)),
    ("out_expanded", V, "out", "elements that do not overlap", lambda i: on_device(with_strides(i.out, 0, 64, 1))),
    ("no_out", T, "out", "since a GPU module makes them for torch tensors alone, got None", lambda i: None),
    ("scale", V, "scale", "expected a finite float32, got nan", lambda i: float("nan")),
    ("check", V, "check", "expected one of host, device, none, got 'gpu'", lambda i: "gpu"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "argument", "words", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_decode_refuses(gpu, gpu_module, error, argument, words, change):
    module = gpu_module(SPEC)
    inputs = make_inputs(SPEC, LENGTHS)
    call = OnGpu(gpu, inputs)
    before = call.results
    gpu.log()
    with pytest.raises(error, match=rf"^{argument}: .*{re.escape(words)}"):
        call.decode(module, **{argument: change(inputs)})
    gpu.run()
    assert gpu.log() == []
    for now, then in zip(call.results, before, strict=True):
        assert_same_bits(now, then)


def test_out_over_an_input(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    with pytest.raises(ValueError, match=r"^out: expected memory apart from query's bytes"):
        call.decode(gpu_module(SPEC), out=call.tensors["query"])


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


@pytest.mark.parametrize(
    ("function", "check"),
    [
        ("cuCtxPushCurrent", "device"),
        ("cuMemAllocFromPoolAsync", "none"),
        ("cuMemsetD32Async", "device"),
        ("cuLaunchKernel", "none"),
        ("cuMemcpyDtoHAsync", "host"),
        ("cuStreamSynchronize", "host"),
        ("cuStreamIsCapturing", "host"),
    ],
)
def test_errors_of_the_driver(gpu, gpu_module, function, check):
    """They are named, memory and contexts are given back, and the next call is as any other."""
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.decode(module, check="none")
    gpu.run()
    gpu.log()
    gpu.fail(function, 2)
    with pytest.raises(RuntimeError, match=rf"^{function}\w*: CUDA_ERROR_NUMBER_2 \(2\): as a test wants it$"):
        call.decode(module, check=check)
    lines = gpu.log()
    assert sum(line.startswith("alloc") for line in lines) == sum(line.startswith("free") for line in lines)
    assert gpu.contexts_pushed() == 0
    call.decode(module)
    gpu.run()
    call.check(SPEC)


def test_an_older_gpu(gpu, gpu_module):
    spec = PagedAttentionSpec(4, 1, 64, 8, "float16")  # of this test alone: a library asks a device once
    module, call = gpu_module(spec), OnGpu(gpu, make_inputs(spec, LENGTHS))
    gpu.set_capability(0, 89)
    try:
        with pytest.raises(
            RuntimeError, match=r"^target: this module is built for sm_90 and later, and CUDA device 0 is sm_89$"
        ):
            call.decode(module)
    finally:
        gpu.set_capability(0, 90)
    call.decode(module)
    gpu.run()
    call.check(spec)


def test_a_device_that_is_not_there(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS), device=2)
    with pytest.raises(RuntimeError, match=r"^cuDeviceGet: "):
        call.decode(gpu_module(SPEC))


def test_a_first_call_that_fails(gpu, gpu_module):
    """The next one begins anew."""
    spec = PagedAttentionSpec(2, 1, 32, 4, "float32")
    module, call = gpu_module(spec), OnGpu(gpu, make_inputs(spec, LENGTHS), device=1)
    for function in ("cuInit", "cuLibraryLoadData", "cuLibraryGetKernel", "cuMemPoolCreate", "cuMemHostAlloc"):
        gpu.fail(function, 3)
        with pytest.raises(RuntimeError, match=rf"^{function}\w*: CUDA_ERROR_NUMBER_3"):
            call.decode(module)
    call.decode(module)
    gpu.run()
    call.check(spec)


def test_a_first_call_in_a_graph(gpu, gpu_module):
    """What a library keeps may be made while a stream is captured."""
    spec = PagedAttentionSpec(4, 2, 32, 4, "float32")
    module, call = gpu_module(spec), OnGpu(gpu, make_inputs(spec, LENGTHS))
    with stream(5):
        gpu.capture(5, True)
        call.decode(module)
        gpu.capture(5, False)
    gpu.replay()
    call.check(spec)
