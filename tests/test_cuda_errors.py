"""Bad calls of CUDA modules: the argument, what was expected and what came, before anything is launched."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_driver import OnGpu, stream
from dlpack import CUDA, READ_ONLY, Exported, Legacy
from inputs import make_inputs
from numpy.lib.stride_tricks import as_strided
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


class Scalar(Exported):
    """An array of no axes."""

    def item(self):
        raise AssertionError("it would wait for the GPU")


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
    ("int64_table", T, "block_table", "expected dtype int32, got int64",
     lambda i: on_device(i.block_table.astype(np.int64))),
    ("int64_lens", T, "context_lens", "expected dtype int32, got int64",
     lambda i: on_device(i.context_lens.astype(np.int64))),
    ("no_memory", V, "key_cache", "expected an array with memory, got one without",
     lambda i: Exported(i.key_cache, device=CUDA, address=0)),
    ("first_page", V, "block_table", "expected an array with memory, got one without",
     lambda i: Exported(i.block_table, device=CUDA, address=4096)),
    ("read_only", V, "out", "expected a writable array, got a read-only one",
     lambda i: Exported(i.out, device=CUDA, flags=READ_ONLY)),
    ("not_known_to_be_writable", V, "out", "expected an array that is known to be writable",
     lambda i: Legacy(i.out, device=CUDA)),
    ("out_side_by_side", V, "out", "expected shape [3, 512], got [3, 511]",
     lambda i: on_device(i.out.reshape(3, 512)[:, :511])),
    ("scale_on_gpu", V, "scale", "expected a number or an array on the CPU, got one on device type 2",
     lambda i: Scalar(np.ones((), np.float32), device=CUDA)),
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


def test_out_with_its_heads_side_by_side(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    out = gpu.tensor(call.inputs.out.reshape(3, 512))
    assert call.decode(gpu_module(SPEC), lse=False, out=out) is out
    gpu.run()
    call.decode(gpu_module(SPEC))
    gpu.run()
    assert_same_bits(out.array.reshape(3, 8, 64), call.results[0])


def test_tensors_without_memory(gpu_module):
    """Whatever their device: a view of freed memory begins where its offset ends."""
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    room = torch.empty(1 << 24)
    arguments = [room[1 << 23 :][:512].view(1, 8, 64), *([room] * 4)]
    room.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^query: expected a tensor with memory, got one whose storage"):
        gpu_module(SPEC).decode(*arguments)


@pytest.mark.parametrize("like", ["numpy", "jax"])
def test_caches_are_torchs(gpu_module, like):
    pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    with pytest.raises(ValueError, match=rf"^like: expected 'torch' for a GPU module, got '{like}'$"):
        gpu_module(SPEC).empty_cache(2, like=like)


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
