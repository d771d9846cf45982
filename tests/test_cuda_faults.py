"""Emitted kernels that are broken on purpose: the emulator stops them and says why, or the oracle finds the result."""

from __future__ import annotations

import dataclasses
import re

import pytest
from cuda_emulator import EmulationError
from cuda_kernels import on_device
from inputs import make_inputs
from test_append import far_apart
from tolerances import assert_close_to_oracle

from pa_compiler import PagedAttentionSpec

MMA = PagedAttentionSpec(4, 1, 64, 16, "bfloat16")
FMA = PagedAttentionSpec(2, 1, 64, 16, "bfloat16")
FLOAT16 = PagedAttentionSpec(4, 1, 64, 16, "float16")
LONGER = PagedAttentionSpec(4, 1, 64, 16, "bfloat16", value_dim=128)
IN_FLIGHT = r"cp\.async of thread \d+ is in flight"
RACE = r"race: it (reads|writes) \d+ bytes at byte \d+ of shared memory"
WRONG = "elements out of tolerance"

FAULTS = {  # name: (spec, pattern, replacement, what is found)
    "waits_for_too_few": (MMA, r"wait_group ([1-9]);", r"wait_group 9;", IN_FLIGHT),
    "waits_for_too_few_fma": (FMA, r"wait_group ([1-9]);", r"wait_group 9;", IN_FLIGHT),
    "never_commits": (MMA, r'asm volatile\("cp.async.commit_group;".*', "", IN_FLIGHT),
    "no_warp_barrier": (MMA, r"__syncwarp\(\);", "", RACE),
    "no_block_barrier": (MMA, r"__syncthreads\(\);", "", RACE),
    "no_block_barrier_fma": (FMA, r"__syncthreads\(\);", "", RACE),
    "swizzle": (MMA, r"(cp_async_cg\w*\(.*\^ \(row_ptr\S* %) 8\)", r"\1 4)", WRONG),
    "values_not_transposed": (MMA, r"x4\.trans\.shared\.b16 \{", "x4.shared.b16 {", WRONG),
    "weights_not_transposed": (MMA, r'asm volatile\("movmatrix.*', "__d = __a;", WRONG),
    "order_of_a_pair": (MMA, r"(cvt\.rn\.bf16x2\.f32 %0), %1, %2", r"\1, %2, %1", WRONG),
    "order_of_a_fragment": (MMA, r"\{%4, %5, %6, %7\}", "{%4, %6, %5, %7}", WRONG),
    "reads_stale_slots": (MMA, r"\[%1\], 16, %2;", "[%1], 16;", WRONG),
    "lane_of_a_shuffle": (MMA, r"(__shfl_xor_sync\(.*), 8, 32\)", r"\1, 4, 32)", WRONG),
    "lane_of_a_shuffle_fma": (FMA, r"(__shfl_xor_sync\(.*), 8, 32\)", r"\1, 16, 32)", WRONG),
    "not_rescaled": (FLOAT16, r"acc_ptr\[(\d+)\] = \(acc_ptr\[\1\] \* alpha\w*\[0\]\);", "", WRONG),
    "not_rescaled_fma": (FMA, r"row_sum_ptr\[(\d+)\] = \(row_sum_ptr\[\1\] \* alpha\w*\[0\]\);", "", WRONG),
    "nothing_less_nothing": (MMA, r"\(\((\w+\[0\]) == -CUDART_INF_F\) \? \S+ : \1\)", r"(\1)", WRONG),
    "values_where_keys_are": (LONGER, r"keys_ptr\[0\]\) \+ 512\)", "keys_ptr[0]))", WRONG),
    "other_range": (MMA, r"(found_ptr\[1\] = .*nth.*);", r"\1 + 64;", WRONG),
}


@pytest.fixture
def edited(emulated, cuda_decode):
    """edited(spec, pattern, replacement) -> kernels of a text in which every match, one at least, is replaced."""

    def edit(spec, pattern, replacement):
        kernels = cuda_decode(spec)
        source, count = re.subn(pattern, replacement, kernels.source)
        assert count, f"{pattern} is not in the emitted text"
        return dataclasses.replace(kernels, kernels=emulated(source), source=source)

    return edit


@pytest.mark.parametrize("name", FAULTS)
def test_fault(edited, name):
    spec, pattern, replacement, found = FAULTS[name]
    kernels = edited(spec, pattern, replacement)
    inputs = on_device(make_inputs(spec, [0, 1, 17, 300, 777]))
    with pytest.raises((EmulationError, AssertionError), match=found):
        assert_close_to_oracle(spec, inputs, *kernels.decode(inputs))


@pytest.mark.parametrize("spec", [MMA, FMA], ids=["mma", "fma"])
def test_without_a_fault(edited, spec):
    kernels, inputs = edited(spec, r"\Z", "\n"), on_device(make_inputs(spec, [0, 1, 17, 300, 777]))
    assert_close_to_oracle(spec, inputs, *kernels.decode(inputs))


@pytest.mark.parametrize("spec", [MMA, FMA], ids=["mma", "fma"])
def test_offsets_of_32_bits(edited, spec):
    """They leave a cache of more than 2^31 elements."""
    kernels = edited(spec, r"\bint64_t\b", "int")
    inputs = on_device(make_inputs(spec, [20]))
    far = {name: far_apart(getattr(inputs, name)) for name in ("key_cache", "value_cache")}
    with pytest.raises(EmulationError, match=r"reads \d+ bytes at byte -?\d+ of (key|value)_cache"):
        kernels.decode(inputs.replace(**far))


def test_without_swizzles(edited):
    """The same result, but not as fast."""
    kernels, inputs = edited(MMA, r" \^ \(", " + 0 * ("), on_device(make_inputs(MMA, [0, 1, 17, 300, 777]))
    decode = kernels.kernels["cuda_decode_kernel"]
    before = decode.bank_conflicts
    assert_close_to_oracle(MMA, inputs, *kernels.decode(inputs))
    assert decode.bank_conflicts > before
