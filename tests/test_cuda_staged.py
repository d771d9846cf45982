"""The staged pipeline on CUDA, on the fake driver: the CPU's stages under a schedule of threads, and their host."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_driver import OnGpu, stream
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle

import pa_compiler
from pa_compiler import PagedAttentionSpec

SPECS = {
    "bfloat16": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "float16": PagedAttentionSpec(6, 2, 48, 5, "float16", "float32", kv_layout="HND"),
    "float32": PagedAttentionSpec(2, 2, 16, 1, "float32"),
    "tiles_of_rows": PagedAttentionSpec(38, 2, 16, 8, "float32"),
    "small_tiles": PagedAttentionSpec(9, 1, 32, 130, "bfloat16", head_tile=4, batch_chunk=2),
}
SPEC = SPECS["bfloat16"]
LENGTHS = [0, 1, 90, 33]


@pytest.fixture
def staged(gpu_module):
    return lambda spec: gpu_module(spec, "staged")


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("check", ["host", "none"])
@pytest.mark.parametrize("name", SPECS)
def test_decode(gpu, staged, name, check, order):
    spec = SPECS[name]
    gpu.set_order(order)
    call = OnGpu(gpu, make_inputs(spec, LENGTHS))
    call.decode(staged(spec), check=check)
    gpu.run()
    call.check(spec)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(gpu, staged, poison):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS, poison=poison))
    call.decode(staged(SPEC))
    gpu.run()
    call.check(SPEC)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_ends_of_the_types(gpu, staged, name):
    """Products of queries and keys that float32 has not, of scores that it has, and the largest values."""
    spec, scale = SPECS[name], 0.3 * 2.0**-129
    inputs = make_inputs(spec, LENGTHS)
    inputs.value_cache[np.isfinite(inputs.value_cache)] = -3.38e38
    inputs = inputs.replace(query=inputs.query * inputs.query.dtype.type(2.0**66))
    call = OnGpu(gpu, inputs.replace(key_cache=inputs.key_cache * inputs.key_cache.dtype.type(2.0**63)))
    call.decode(staged(spec), scale=scale)
    gpu.run()
    assert_close_to_oracle(spec, call.inputs, *call.results, scale=scale)


@pytest.mark.parametrize("batch", [15, 16, 17, 33])
def test_chunks(gpu, staged, batch):
    spec = SPECS["float32"]
    call = OnGpu(gpu, make_inputs(spec, [1 + 7 * seq % 5 for seq in range(batch)]))
    call.decode(staged(spec))
    gpu.run()
    call.check(spec)


def test_launches(gpu, staged):
    """As many steps as the longest sequence of a chunk has blocks; where lengths are not known, as there may be."""
    spec = SPECS["small_tiles"]
    module = staged(spec)
    call = OnGpu(gpu, make_inputs(spec, [0, 0, 131, 1, 0], surplus=3))
    call.decode(module, check="none")
    gpu.run()
    steps = {}
    for check in (None, "host", "none"):
        gpu.log()
        call.decode(module, check=check)
        gpu.run()
        steps[check] = [line.split()[1].removesuffix("_kernel") for line in gpu.log() if line.startswith("launch")]
    stages, tiles = ["qk_matmul", "softmax_prepare", "pv_matmul", "online_update"], 3
    assert steps["host"] == [name for blocks in (1, 2, 1) for name in [*stages * blocks, "normalize"] * tiles]
    assert steps[None] == steps["host"]
    assert steps["none"] == [*stages * 5, "normalize"] * tiles * 3
    call.check(spec)


def test_without_lse(gpu, staged):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.decode(staged(SPEC), lse=False)
    gpu.run()
    call.check(SPEC, lse=False)
    assert np.isnan(call.results[1]).all()


def test_graph(gpu, staged):
    module = staged(SPEC)
    inputs = make_inputs(SPEC, LENGTHS)
    call = OnGpu(gpu, inputs)
    with stream(5):
        gpu.capture(5, True)
        call.decode(module, check="none")
        gpu.capture(5, False)
    gpu.run()
    gpu.replay()
    assert_close_to_oracle(SPEC, inputs, *call.results)


def test_no_host_check_in_a_graph(gpu, staged):
    module, call = staged(SPEC), OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    with stream(5):
        gpu.capture(5, True)
        with pytest.raises(
            ValueError, match=r"^check: expected 'none' while the stream is captured into a graph, got 'host'$"
        ):
            call.decode(module)
        gpu.capture(5, False)


def test_bad_indices(gpu, staged):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    call.tensors["context_lens"].array[2] = 129
    with pytest.raises(ValueError, match=r"^context_lens: expected a length from 0 to 128 for sequence 2, got 129$"):
        call.decode(staged(SPEC))
    gpu.run()
    assert not any(line.startswith("launch") for line in gpu.log())


def test_checks(gpu, staged):
    call = OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    with pytest.raises(ValueError, match=r"^check: expected one of host, none, got 'device'$"):
        call.decode(staged(SPEC), check="device")


def test_append_is_the_same(gpu_module):
    sources = [gpu_module(SPEC, pipeline).sources["cuda"] for pipeline in ("fused", "staged")]
    kernels = [text[text.rindex("cuda_append_kv_kernel(") :].partition("\n}\n")[0] for text in sources]
    assert kernels[0] == kernels[1]


def test_blocks_that_are_too_large():
    spec = PagedAttentionSpec(8, 2, 64, 4096, "bfloat16")
    with pytest.raises(
        ValueError, match=r"^block_size: expected up to 2048 for target cuda and pipeline staged, got 4096$"
    ):
        pa_compiler.compile(spec, target="cuda", pipeline="staged")
