"""The CUDA kernels, run by the emulator on the CPU, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import numpy as np
import pytest
from cuda_calls import ARCH, EmulatedModule
from cuda_emulator import ORDERS, EmulationError
from inputs import POISONS, make_inputs
from test_append import Call, far_apart
from test_invariance import sparse
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec, cuda_tiling

Spec = functools.partial(PagedAttentionSpec, out_dtype=None)
SPECS = {  # every group up to 16; head sizes, block sizes, types and layouts take turns
    "group_1": PagedAttentionSpec(2, 2, 128, 16, "bfloat16"),
    "group_2": PagedAttentionSpec(4, 2, 64, 1, "float16", "float32"),
    "group_3": PagedAttentionSpec(3, 1, 64, 5, "bfloat16", "float32", kv_layout="HND"),
    "group_4": PagedAttentionSpec(8, 2, 128, 16, "bfloat16"),
    "group_5": PagedAttentionSpec(5, 1, 256, 8, "float16"),
    "group_6": PagedAttentionSpec(12, 2, 64, 32, "bfloat16", "float32", kv_layout="HND"),
    "group_7": PagedAttentionSpec(7, 1, 80, 1, "bfloat16"),
    "group_8": PagedAttentionSpec(8, 1, 128, 5, "float16", "float32"),
    "group_12": PagedAttentionSpec(12, 1, 256, 16, "bfloat16", "float32"),
    "group_16": PagedAttentionSpec(16, 1, 64, 32, "float16", "bfloat16", kv_layout="HND"),
    "group_20": PagedAttentionSpec(20, 1, 16, 8, "bfloat16", "float16"),
    "float32_group_1": PagedAttentionSpec(3, 3, 64, 16, "float32", kv_layout="HND"),
    "float32_group_5": PagedAttentionSpec(10, 2, 128, 1, "float32", "bfloat16"),
    "float32_group_16": PagedAttentionSpec(16, 1, 256, 16, "float32"),
}
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 300, 0, 777]

every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def module_of(emulated):
    """module_of(spec) -> EmulatedModule, the same one each time."""
    return functools.cache(lambda spec: EmulatedModule(spec, emulated))


def check(module, inputs, **options):
    out, lse = module.decode(inputs, **options)
    assert module.status[0] == 0
    assert_close_to_oracle(module.spec, inputs, out, lse, options.get("scale"))
    return out, lse


@pytest.mark.parametrize("name", SPECS)
def test_spec(module_of, name):
    """Empty, short and long sequences, with each poison in all that is not used; the same bits in either order."""
    module = module_of(SPECS[name])
    inputs = make_inputs(module.spec, LENGTHS)
    out, lse = check(module, inputs)
    for array, expected in zip(module.decode(inputs, order="reverse"), (out, lse), strict=True):
        assert_same_bits(array, expected)
    for seed, (poison, extra) in enumerate(zip(POISONS, (1, 2, 7, 40, 1, 3), strict=True)):
        lengths = np.random.default_rng(seed).integers(0, 130, 1 + 7 * seed)
        check(module, make_inputs(module.spec, lengths, seed=seed, poison=poison), extra=extra)
