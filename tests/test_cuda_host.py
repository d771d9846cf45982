"""The host of CUDA modules, on a fake driver whose kernels the emulator runs: real libraries from end to end."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_driver import OnGpu, stream
from inputs import make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import tiling as cuda_tiling

SPECS = {
    "tensor_cores": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "fma": PagedAttentionSpec(2, 2, 64, 8, "float32", "float16", kv_layout="HND"),
}
SPEC = SPECS["tensor_cores"]
LENGTHS = [0, 1, 700, 33]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("check", ["host", "device", "none"])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_decode(gpu, gpu_module, name, check, order):
    spec = SPECS[name]
    gpu.set_order(order)
    call = OnGpu(gpu, make_inputs(spec, LENGTHS))
    result = call.decode(gpu_module(spec), check=check)
    assert result == (call.tensors["out"], call.tensors["lse"])
    gpu.run()
    call.check(spec)


def test_launches(gpu, gpu_module):
    """What each way to check costs: nothing is copied or waited for but by "host"."""
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.decode(module)  # makes what is kept
    gpu.run()
    seen = {}
    for check in (None, "device", "none", "host"):
        gpu.log()
        call.decode(module, check=check)
        gpu.run()
        seen[check] = [line.split()[line.startswith("launch")] for line in gpu.log()]
    launches = ["cuda_decode_kernel", "cuda_merge_kernel"]
    assert seen["none"] == ["alloc", *launches, "free"]
    assert seen["device"] == ["alloc", "memset", "cuda_check_kernel", *launches, "free"]
    assert seen[None] == seen["device"]
    assert seen["host"] == ["copy", "copy", "alloc", *launches, "free"]


@pytest.mark.parametrize("kv_heads", [3, 5, 6, 7, 17])
def test_a_launch_has_the_workers_that_the_policy_counts(gpu, gpu_module, kv_heads):
    """The host's formula and the policy's, also where the heads do not divide what the GPU runs at once."""
    spec = PagedAttentionSpec(kv_heads, kv_heads, 16, 8, "float32")
    call = OnGpu(gpu, make_inputs(spec, [700, 3]))
    call.decode(gpu_module(spec), check="none")
    gpu.run()
    (grid,) = (int(line.partition("grid=")[2].split()[0]) for line in gpu.log() if "cuda_decode_kernel" in line)
    assert grid == (2 + cuda_tiling.extra_workers(kv_heads, gpu.resident_blocks())) * kv_heads
    call.check(spec)


def test_nothing_runs_before_its_turn(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.decode(gpu_module(SPEC))
    assert np.isnan(call.results[1]).all()
    gpu.run()
    call.check(SPEC)


def test_without_lse(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    assert call.decode(gpu_module(SPEC), lse=False) is call.tensors["out"]
    gpu.run()
    call.check(SPEC, lse=False)
    assert np.isnan(call.results[1]).all()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("query", "key", "scale"),
    [(1, 1, 0.5), (2.0**66, 2.0**63, -0.3 * 2.0**-129), (2.0**-60, 2.0**-15, 0.3 * 2.0**75), (2.0**100, 2.0**100, 0)],
)
def test_scale(gpu, gpu_module, name, query, key, scale):
    """Queries and keys are small or large, and the scores are not."""
    inputs = make_inputs(SPECS[name], LENGTHS)
    inputs = inputs.replace(query=inputs.query * inputs.query.dtype.type(query))
    call = OnGpu(gpu, inputs.replace(key_cache=inputs.key_cache * inputs.key_cache.dtype.type(key)))
    call.decode(gpu_module(SPECS[name]), scale=scale)
    gpu.run()
    assert_close_to_oracle(SPECS[name], call.inputs, *call.results, scale=scale)


def test_streams_and_devices(gpu, gpu_module):
    """Each call on the stream that is current on the device of its tensors, memory and all."""
    module = gpu_module(SPEC)
    calls = [OnGpu(gpu, make_inputs(SPEC, LENGTHS, seed=device), device) for device in (0, 1)]
    with stream(7, 0), stream(9, 1):
        for call in calls:
            call.decode(module, check="none")
    lines = [line for line in gpu.log() if "stream=" in line]
    places = [line[line.index("device=") :].split()[:2] for line in lines]
    work = [place for place in places if place[1] in ("stream=7", "stream=9")]
    assert work == [["device=0", "stream=7"]] * 4 + [["device=1", "stream=9"]] * 4
    gpu.run()
    for call in calls:
        call.check(SPEC)


def test_empty_batch(gpu, gpu_module):
    module = gpu_module(SPEC)
    OnGpu(gpu, make_inputs(SPEC, LENGTHS)).decode(module)
    gpu.run()
    gpu.log()
    OnGpu(gpu, make_inputs(SPEC, [])).decode(module)
    assert gpu.log() == []


BAD = {
    "length": ("context_lens", (2,), 9999, ValueError, r"expected a length from 0 to 736 for sequence 2, got 9999"),
    "negative_length": ("context_lens", (1,), -1, ValueError, "expected a length .* for sequence 1, got -1"),
    "block": ("block_table", (2, 40), 1000, IndexError, r"in \[0, 51\), got 1000 for sequence 2 at position 40"),
    "negative_block": ("block_table", (3, 2), -5, IndexError, "block id .* got -5 for sequence 3 at position 2"),
}
"""Argument, place in it, what is there, the error, and its words after the argument's name."""


@pytest.mark.parametrize("case", BAD)
def test_bad_indices_on_the_host(gpu, gpu_module, case):
    name, place, value, error, message = BAD[case]
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.tensors[name].array[place] = value
    with pytest.raises(error, match=f"^{name}: .*{message}$"):
        call.decode(module, check="host")
    gpu.run()
    assert gpu.launches() == []


@pytest.mark.parametrize("by", ["the next call", "check_status"])
@pytest.mark.parametrize("case", BAD)
def test_bad_indices_on_the_device(gpu, gpu_module, case, by):
    """Nothing is written; the error is raised later, once."""
    name, place, value, error, message = BAD[case]
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    right = call.tensors[name].array[place]
    call.tensors[name].array[place] = value
    call.decode(module)
    module.check_status()  # nothing has run yet
    gpu.run()
    assert all(np.isnan(array.astype(np.float32)).all() for array in call.results)
    gpu.log()
    call.tensors[name].array[place] = right
    with pytest.raises(error, match=f"^{name}: .*{message} in an earlier call, which wrote nothing$"):
        call.decode(module) if by == "the next call" else module.check_status()
    assert gpu.log() == []
    module.check_status()
    call.decode(module)
    gpu.run()
    call.check(SPEC)
    module.check_status()


def test_the_first_of_several_bad_indices(gpu, gpu_module):
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.tensors["block_table"].array[2, [20, 30]] = -7, -8
    call.tensors["context_lens"].array[3] = -1
    call.decode(module)
    gpu.run()
    with pytest.raises(IndexError, match="got -7 for sequence 2 at position 20"):
        module.check_status()


def test_each_bad_call_is_raised(gpu, gpu_module):
    module = gpu_module(SPEC)
    calls = [OnGpu(gpu, make_inputs(SPEC, LENGTHS)) for _ in range(3)]
    for number in (0, 2):
        calls[number].tensors["context_lens"].array[0] = -1 - number
    for call in calls:
        call.decode(module)
    gpu.run()
    calls[1].check(SPEC)  # not stopped by the others
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got -[13] in an earlier call"):
            module.check_status()
    module.check_status()


def test_host_check_of_a_strided_table(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    wide = np.full((len(LENGTHS), 3 * call.inputs.block_table.shape[1]), 77, np.int32)
    view = wide[:, 5 : 5 + call.inputs.block_table.shape[1]]
    view[...] = call.inputs.block_table
    call.decode(gpu_module(SPEC), check="host", block_table=gpu.tensor(view))
    gpu.run()
    call.check(SPEC)


@pytest.mark.parametrize("check", ["device", "none"])
def test_graph(gpu, gpu_module, check):
    """A captured call is replayed with other contents, lengths among them; memory is there at each replay."""
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, [0, 0, 0, 0]))
    inputs = make_inputs(SPEC, LENGTHS)
    tensors = [gpu.tensor(array) for array in inputs.arguments]
    lengths = tensors[4].array.copy()
    tensors[4].array[:] = 0
    with stream(5):
        gpu.capture(5, True)
        module.decode(*tensors, out=call.tensors["out"], lse=call.tensors["lse"], check=check)
        gpu.capture(5, False)
    gpu.run()
    assert np.isnan(call.results[1]).all()
    for repeat in range(2):
        tensors[4].array[:] = lengths if repeat else 0
        gpu.replay()
        given = inputs.replace(context_lens=tensors[4].array)
        assert_close_to_oracle(SPEC, given, *call.results)
    if check == "device":
        tensors[4].array[1] = -3
        before = call.results
        gpu.replay()
        assert_same_bits(call.results[0], before[0])
        with pytest.raises(ValueError, match="for sequence 1, got -3"):
            module.check_status()


def test_no_host_check_in_a_graph(gpu, gpu_module):
    module = gpu_module(SPEC)
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    with stream(5):
        gpu.capture(5, True)
        with pytest.raises(ValueError, match="check: expected 'device' or 'none' while the stream is captured"):
            call.decode(module, check="host")
        gpu.capture(5, False)
