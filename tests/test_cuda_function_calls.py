"""Modules for a GPU with score_mod, mask_mod and inputs, on the fake driver: arrays, tables, and checks of indices."""

from __future__ import annotations

import dataclasses

import gpu_memory
import numpy as np
import pytest
import test_score_functions as functions
from cuda_driver import OnGpu, stream
from test_cuda_functions import assert_close, inputs_of, sinks_and_window, spec_of, with_table
from test_cuda_score_calls import every_way
from test_cuda_scores import BASES, assert_same

from pa_compiler.verification import on_gpu, verify

LENGTHS = [0, 1, 190, 33, 41]


def decode(gpu, module, inputs, **others):
    call = OnGpu(gpu, inputs)
    given = {name: gpu.tensor(array, writable=False) for name, array in inputs.given.items()}
    call.decode(module, inputs=given, **others)
    gpu.run()
    gpu.log()
    return call.results


@every_way
def test_decode(gpu, gpu_module, pipeline, check):
    spec = spec_of("mma", score_mod=functions.by_sequence, mask_mod=functions.documents, window=120, sinks=True)
    inputs = inputs_of(spec, LENGTHS)
    assert_close(spec, decode(gpu, gpu_module(spec, pipeline), inputs, check=check), inputs)


@every_way
def test_blocks_that_nobody_sees(gpu, gpu_module, pipeline, check):
    """Their ids are neither checked nor followed; others are checked."""
    spec = spec_of("mma", mask_mod=sinks_and_window)
    module, inputs = gpu_module(spec, pipeline), inputs_of(spec, LENGTHS)
    assert (inputs.block_table[2, 1:5] == np.iinfo(np.int32).max).all()
    assert_close(spec, decode(gpu, module, inputs, check=check), inputs)
    if check != "none":
        inputs.block_table[2, 5] = -1

        def decode_and_wait():
            decode(gpu, module, inputs, check=check)
            module.check_status()

        with pytest.raises(IndexError, match=r"got -1 for sequence 2 at position 5"):
            decode_and_wait()


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_tables(gpu, gpu_module, pipeline):
    """A library has them, and brings them to a device once, even where a graph is captured."""
    of_table, of_input, given = with_table(BASES["mma"])
    of_table = dataclasses.replace(
        of_table, batch_chunk=2 if pipeline == "fused" else 4
    )  # libraries of this test's own
    inputs = inputs_of(BASES["mma"], LENGTHS)
    expected = decode(gpu, gpu_module(of_input, pipeline), inputs.replace(given=given), check="none")
    module = gpu_module(of_table, pipeline)
    gpu.log()
    with stream(5):
        gpu.capture(5, True)
        call = OnGpu(gpu, inputs)
        call.decode(module, check="none")
        gpu.capture(5, False)
    assert sum(line.startswith("upload") for line in gpu.log()) == 1
    gpu.replay()
    assert_same(call.results, expected)
    call.decode(module, check="none")
    gpu.run()
    assert not any(line.startswith("upload") for line in gpu.log())
    assert_same(call.results, expected)


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_verify(gpu, gpu_module, pipeline):
    spec = spec_of("mma", score_mod=functions.by_sequence, mask_mod=functions.documents, window=120, sinks=True)
    module = on_gpu.OnGpu(gpu_module(spec, pipeline), gpu_memory.FakeMemory(gpu))
    for number in range(3):
        result = verify.verify(module, seed=1, draw=number)
        assert result.passed, result.failures
        gpu.release()


def test_inputs_are_checked(gpu, gpu_module):
    spec = spec_of("mma", score_mod=functions.relative)
    module, inputs = gpu_module(spec), inputs_of(spec, LENGTHS)
    call, slopes = OnGpu(gpu, inputs), inputs.given["slopes"]
    for wrong, error in (
        ({}, r"^inputs: expected arrays named slopes, got none$"),
        ({"slopes": gpu.tensor(slopes.astype(np.int32))}, r"^inputs\['slopes'\]: "),
        ({"slopes": gpu.tensor(slopes[:-1])}, r"^inputs\['slopes'\]: expected shape \[32\], got \[31\]"),
        (
            {"slopes": gpu.tensor(np.zeros((32, 2), np.float32)[:, 0])},
            r"^inputs\['slopes'\]: expected elements side by",
        ),
        ({"slopes": gpu.tensor(slopes, device=1)}, r"^inputs\['slopes'\]: expected an array on CUDA device 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            call.decode(module, inputs=wrong)
