"""Modules for a GPU with windows, soft caps, ALiBi and sinks, on the fake driver: hosts, and checks of indices."""

from __future__ import annotations

import dataclasses

import gpu_memory
import numpy as np
import pytest
from cuda_driver import OnGpu
from inputs import make_inputs

from pa_compiler import PagedAttentionSpec
from pa_compiler.verification import on_gpu, verify

BASE = PagedAttentionSpec(8, 2, 32, 16, "bfloat16")
SPEC = dataclasses.replace(BASE, window=40, softcap=5.0, alibi=True, sinks=True)
LENGTHS = [0, 1, 90, 33, 41]

WAYS = [("fused", "host"), ("fused", "device"), ("fused", "none"), ("staged", "host"), ("staged", "none")]
every_way = pytest.mark.parametrize(("pipeline", "check"), WAYS)


def decode(gpu, module, inputs, **others):
    call = OnGpu(gpu, inputs)
    call.decode(module, **others)
    gpu.run()
    return call


@every_way
def test_decode(gpu, gpu_module, pipeline, check):
    decode(gpu, gpu_module(SPEC, pipeline), make_inputs(SPEC, LENGTHS), check=check).check(SPEC)


@pytest.mark.parametrize("name", ["alibi", "sinks"])
@every_way
def test_one_array(gpu, gpu_module, name, pipeline, check):
    spec = dataclasses.replace(BASE, **{name: True})
    decode(gpu, gpu_module(spec, pipeline), make_inputs(spec, LENGTHS), check=check).check(spec)


@pytest.mark.parametrize(("pipeline", "check"), WAYS[:2] + WAYS[3:4])
def test_block_ids(gpu, gpu_module, pipeline, check):
    """Those before a window are not looked at; the first in it is."""
    module, inputs = gpu_module(SPEC, pipeline), make_inputs(SPEC, LENGTHS)
    assert (inputs.block_table[2, :3] < 0).sum() + (inputs.block_table[2, :3] >= len(inputs.key_cache)).sum() == 3
    inputs.block_table[2, 3] = -1
    call = OnGpu(gpu, inputs)

    def decode():
        call.decode(module, check=check)
        gpu.run()
        module.check_status()

    with pytest.raises(IndexError, match=r"got -1 for sequence 2 at position 3"):
        decode()
    assert np.isnan(call.results[0].astype(np.float32)).all()


def test_steps_of_a_window(gpu, gpu_module):
    """From the first block that one of a chunk's sequences sees; where lengths are not known, from the first of all."""
    spec = dataclasses.replace(BASE, window=40, batch_chunk=2)
    module, inputs = gpu_module(spec, "staged"), make_inputs(spec, [90, 75, 41, 90], surplus=0)
    steps = {}
    for check in ("host", "none"):
        gpu.log()
        decode(gpu, module, inputs, check=check).check(spec)
        launched = [line.split()[1] for line in gpu.log() if line.startswith("launch")]
        steps[check] = launched.count("qk_matmul_kernel") // spec.num_kv_heads
    assert steps == {"host": (6 - 2) + (6 - 0), "none": 12}


def test_arrays_by_head(gpu, gpu_module):
    """They are checked as every other array: there, float32, one for each head, and on the device of the others."""
    module, call = gpu_module(SPEC), OnGpu(gpu, make_inputs(SPEC, LENGTHS))
    short = gpu.tensor(np.zeros(7, np.float32))
    elsewhere = gpu.tensor(np.zeros(8, np.float32), device=1)
    for name in ("alibi_slopes", "sinks"):
        with pytest.raises(TypeError, match=f"^{name}: "):
            call.decode(module, **{name: None})
        with pytest.raises(ValueError, match=rf"^{name}: expected .*\[8\].*got .*\[7\]"):
            call.decode(module, **{name: short})
        with pytest.raises(
            ValueError, match=f"^{name}: expected an array on CUDA device 0, where query is, got one on"
        ):
            call.decode(module, **{name: elsewhere})


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_verify(gpu, gpu_module, pipeline):
    module = on_gpu.OnGpu(gpu_module(SPEC, pipeline), gpu_memory.FakeMemory(gpu))
    for number in range(6):
        result = verify.verify(module, seed=1, draw=number)
        assert result.passed, result.failures
        gpu.release()
