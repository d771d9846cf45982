"""block_table as a pair (indptr, indices) on a GPU: the bits of a table, whoever checks, and bad pairs."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_driver import OnGpu
from inputs import make_inputs
from test_cuda_host import LENGTHS, SPEC
from tolerances import assert_same_bits

from pa_compiler.verification.inputs import as_pair

PIPELINES = {"fused": ("device", "host", "none"), "staged": ("host", "none")}


def make_pair(inputs, ends=(2**31 - 1, -7)):
    """A pair with entries past its end that may be anything."""
    indptr, indices = as_pair(inputs.block_table, inputs.context_lens, SPEC.block_size)
    return indptr, np.append(indices, ends).astype(np.int32)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_bits_are_those_of_a_table(gpu, gpu_module, pipeline):
    module, inputs = gpu_module(SPEC, pipeline), make_inputs(SPEC, LENGTHS)
    table = OnGpu(gpu, inputs)
    table.decode(module, check="host")
    gpu.run()
    for check in PIPELINES[pipeline]:
        call = OnGpu(gpu, inputs)
        # the staged pipeline takes as many steps as indices has entries where nobody looks at the lengths
        pair = make_pair(inputs)
        call.decode(module, check=check, block_table=tuple(gpu.tensor(array) for array in pair))
        gpu.run()
        module.check_status()
        for one, other in zip(call.results, table.results, strict=True):
            assert_same_bits(one, other)


def changed(at, value):
    def change(indptr, indices):
        indptr[at] = value

    return change


def with_id(block):
    def change(indptr, indices):
        indices[indptr[2] + 1] = block

    return change


# what is changed, the error on the host, and what a kernel reports
NEVER = r"block_table\[0\]: expected numbers from 0 to \d+ that never fall, got"
BAD = {
    "begins_late": (changed(0, 1), ValueError, r"block_table\[0\]: expected 0 first, got 1", rf"{NEVER} 1 and then"),
    "falls": (changed(3, 1), ValueError, r"block_table\[0\]: .* never fall, got 1 after 2", rf"{NEVER} 2 and then 1"),
    "beyond": (changed(-1, 99), ValueError, r"block_table\[0\]: .*, got 99 at", rf"{NEVER} \d+ and then 99"),
    "negative": (changed(1, -1), ValueError, r"block_table\[0\]: .* got -1 after 0", rf"{NEVER} 0 and then -1"),
    "id": (with_id(99), IndexError, *[r"block_table: expected .*, got 99 for sequence 2 at position 1"] * 2),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs(gpu, gpu_module, case):
    change, error, on_host, on_device = BAD[case]
    module, inputs = gpu_module(SPEC), make_inputs(SPEC, LENGTHS)
    call, (indptr, indices) = OnGpu(gpu, inputs), make_pair(inputs)
    change(indptr, indices)
    pair = tuple(gpu.tensor(array) for array in (indptr, indices))
    with pytest.raises(error, match=f"^{on_host}"):
        call.decode(module, check="host", block_table=pair)
    call.decode(module, check="device", block_table=pair)
    gpu.run()
    assert all(np.isnan(array.astype(np.float32)).all() for array in call.results)
    with pytest.raises(error, match=f"^{on_device}.* in an earlier call, which wrote nothing$"):
        module.check_status()


def test_too_few_blocks(gpu, gpu_module):
    """A row of a block less than the length needs, by the kernel and by the host."""
    module, inputs = gpu_module(SPEC), make_inputs(SPEC, [100, 40])
    blocks = inputs.block_table[0, : -(-100 // SPEC.block_size) - 1], inputs.block_table[1, : -(-40 // SPEC.block_size)]
    indptr = np.cumsum([0, *map(len, blocks)]).astype(np.int32)
    call, pair = OnGpu(gpu, inputs), (gpu.tensor(indptr), gpu.tensor(np.concatenate(blocks)))
    message = rf"^context_lens: expected a length from 0 to {len(blocks[0]) * SPEC.block_size} for sequence 0, got 100"
    with pytest.raises(ValueError, match=message):
        call.decode(module, check="host", block_table=pair)
    call.decode(module, block_table=pair)
    gpu.run()
    with pytest.raises(ValueError, match=message):
        module.check_status()
