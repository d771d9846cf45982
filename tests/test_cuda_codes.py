"""Caches of codes on CUDA, run on the emulator: decode and attend against the reference, and every code by itself.

Slots without a token hold NaN of float8, or -128 of int8, and where tokens have scales garbage for those.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cuda_kernels import aligned, on_device
from inputs import DTYPES, make_inputs
from tolerances import assert_close_to_oracle

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda.tiles import Element
from pa_compiler.verification.codes import CODE_DTYPES

KINDS = {
    "int8": {"kv_dtype": "int8"},
    "e4m3": {"kv_dtype": "float8_e4m3fn"},
    "e4m3_of_heads": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head"},
    "e5m2": {"kv_dtype": "float8_e5m2"},
    "e5m2_of_heads": {"kv_dtype": "float8_e5m2", "kv_scale": "head"},
}
"""Every type with every scale that it has."""

LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 256, 257, 0, 300, 700)
GROUPS, LAYOUTS = range(1, 18), ("NHD", "HND")
DIMS = [(64, 64), (16, 16), (128, 128), (80, 80), (96, 32), (48, 112), (32, 160), (256, 256)]


def spec_of(number, kind, layout, group):
    """A spec of a kind, with the other fields in turn: not each of them with each."""
    dtype = ("bfloat16", "float16", "bfloat16", "float32")[number % 4]
    head_dim, value_dim = DIMS[number % len(DIMS)] if group < 9 else DIMS[number % 4]
    kv_heads, block_size = (2, 1)[group > 8], (16, 5, 1, 32, 8)[number % 5]
    out_dtype = (None, "float32", None)[number % 3]
    fields = {"kv_layout": layout, "value_dim": value_dim, **KINDS[kind]}
    return PagedAttentionSpec(group * kv_heads, kv_heads, head_dim, block_size, dtype, out_dtype, **fields)


ALL = {
    f"{kind}-{layout}-group_{group}": spec_of(number, kind, layout, group)
    for number, (group, (kind, layout)) in enumerate(itertools.product(GROUPS, itertools.product(KINDS, LAYOUTS)))
}
"""Every kind in every layout with groups of 1 to 17."""

SOME = dict(itertools.islice(ALL.items(), 0, None, 13))
"""Every kind and layout, and most groups, but not together."""


def check(kernels, spec):
    inputs = on_device(make_inputs(spec, LENGTHS))
    assert_close_to_oracle(spec, inputs, *kernels.decode(inputs))


@pytest.mark.parametrize("spec", SOME.values(), ids=SOME)
def test_decode(cuda_decode, spec):
    check(cuda_decode(spec), spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_decode_of_every_kind(cuda_decode, spec):
    check(cuda_decode(spec), spec)


FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
CODES = np.arange(256, dtype=np.uint8)
WAYS = [("int8", True), ("float8_e4m3fn", True), ("float8_e4m3fn", False), ("float8_e5m2", True)]
"""Types, and whether a GPU has an instruction for float8: it is used for float8_e4m3fn alone."""

every_code = pytest.mark.parametrize("dtype", DTYPES)
every_way = pytest.mark.parametrize(("kv_dtype", "by_instruction"), WAYS)


def of_codes(cuda_decode, kv_dtype, by_instruction, dtype):
    """(spec, kernels) of 256 heads that share a kv head of 256 elements, and a token in each block."""
    spec = PagedAttentionSpec(256, 1, 256, 1, dtype, "float32", kv_dtype=kv_dtype)
    return spec, cuda_decode(spec, element=Element(kv_dtype, by_instruction))


def one_token(spec, query, key, value):
    """Inputs of one sequence with a token of these codes, which count a half."""
    inputs = on_device(make_inputs(spec, [1], spare_blocks=0))
    codes = {
        name: aligned(each.view(CODE_DTYPES[spec.kv_dtype]).reshape(1, 1, 1, 256))
        for name, each in (("key_cache", key), ("value_cache", value))
    }
    heads = {name: np.full_like(scale, 0.5) for name, scale in inputs.heads.items()}
    return inputs.replace(query=aligned(query[None].astype(DTYPES[spec.dtype])), heads=heads, **codes)


@every_way
@every_code
def test_every_code_as_a_key(cuda_decode, kv_dtype, by_instruction, dtype):
    """Head h has a query of 1 in element h: its score, and lse of the one token, is the number of code h."""
    spec, kernels = of_codes(cuda_decode, kv_dtype, by_instruction, dtype)
    numbers = CODES.view(CODE_DTYPES[kv_dtype]).astype(np.float32)
    codes = np.where(np.isfinite(numbers), CODES, 0)
    _, lse = kernels.decode(one_token(spec, np.eye(256), codes, np.zeros_like(codes)), scale=1.0)
    np.testing.assert_array_equal(lse[0], np.where(np.isfinite(numbers), numbers, 0) / 2)


@every_way
@every_code
def test_every_code_as_a_value(cuda_decode, kv_dtype, by_instruction, dtype):
    """out of one token is its value: NaN and infinities of float8 too, each in its own element alone."""
    spec, kernels = of_codes(cuda_decode, kv_dtype, by_instruction, dtype)
    out, lse = kernels.decode(one_token(spec, np.zeros((256, 256)), np.zeros_like(CODES), CODES))
    numbers = CODES.view(CODE_DTYPES[kv_dtype]).astype(np.float32)
    np.testing.assert_array_equal(out[0], np.broadcast_to(numbers / 2, (256, 256)))
    assert not lse.any()


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@every_code
def test_a_code_of_nan_in_a_key_is_nan(cuda_decode, kv_dtype, dtype):
    spec, kernels = of_codes(cuda_decode, kv_dtype, True, dtype)
    out, lse = kernels.decode(one_token(spec, np.ones((256, 256)), np.full_like(CODES, 0x7F), np.zeros_like(CODES)))
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
