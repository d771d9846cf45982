"""Windows, soft caps, ALiBi and sinks in the CUDA kernels on the emulator, against the float64 reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_kernels import build_staged, on_device, shared
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import tiling as cuda_tiling

BASES = {
    "mma": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "mma_in_tiles": PagedAttentionSpec(25, 1, 16, 1, "float16", "float32"),
    "mma_hnd": PagedAttentionSpec(12, 1, 96, 5, "float16", kv_layout="HND"),
    "fma": PagedAttentionSpec(4, 2, 64, 16, "float32"),
    "fma_in_tiles": PagedAttentionSpec(5, 1, 48, 7, "float32", out_dtype="bfloat16"),
    "fma_16_bits": PagedAttentionSpec(2, 2, 80, 32, "bfloat16", kv_layout="HND"),
    "one_cache": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=48, shared_kv=True),
}
"""Every strategy, with tiles of heads of which the last is short, and blocks that no tile is a multiple of."""

FIELDS = {
    "window": {"window": 100},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 1.5, "alibi": True, "sinks": True},
}
ALL = FIELDS["all"]

LENGTHS = (0, 1, 15, 16, 17, 99, 100, 101, 116, 163, 164, 165, 0, 300, 700)

every_base = pytest.mark.parametrize("base", BASES)
one_of_each_strategy = pytest.mark.parametrize("base", ["mma", "fma"])


def spec_of(base, fields):
    return dataclasses.replace(BASES[base], **fields)


def inputs_of(spec, lengths, **more):
    return shared(spec, on_device(make_inputs(spec, lengths, **more)))


def check(kernels, spec, lengths, extra=8, scale=4.0, **more):
    """With a scale that makes some scores larger than the soft cap."""
    inputs = inputs_of(spec, lengths, **more)
    assert_close_to_oracle(spec, inputs, *kernels.decode(inputs, extra=extra, scale=scale), scale)


@every_base
@pytest.mark.parametrize("extra", [1, 8])
def test_all_together(cuda_decode, base, extra):
    spec = spec_of(base, ALL)
    check(cuda_decode(spec), spec, LENGTHS, extra)


@one_of_each_strategy
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "all"])
def test_each_alone(cuda_decode, base, name):
    spec = spec_of(base, FIELDS[name])
    check(cuda_decode(spec), spec, LENGTHS)
