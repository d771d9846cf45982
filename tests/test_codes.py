"""Caches of codes, int8, float8 and int4 with scales beside them, in decode and attend: against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import make_inputs
from ragged_inputs import assert_near_float64, make_ragged
from tolerances import assert_close_to_oracle, assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.runtime.cpu_features import missing_features
from pa_compiler.verification.codes import CODE_DTYPES

INT8, E4M3, E5M2, INT4 = ({"kv_dtype": name} for name in CODE_DTYPES)
NOT_ROTATED = INT4 | {"kv_rotation": "none"}
OF_8_BITS = [name for name in CODE_DTYPES if name != "int4"]

SPECS = {
    "int8": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", **INT8),
    "int8_odd_float16": PagedAttentionSpec(5, 5, 7, 3, "float16", value_dim=9, **INT8),
    "e4m3": PagedAttentionSpec(4, 4, 48, 16, "bfloat16", **E4M3),  # a group of 1
    "e4m3_of_heads": PagedAttentionSpec(34, 2, 32, 8, "bfloat16", kv_layout="HND", kv_scale="head", **E4M3),
    "e4m3_float32": PagedAttentionSpec(16, 1, 16, 16, "float32", **E4M3),
    "e5m2": PagedAttentionSpec(6, 2, 32, 8, "float16", kv_scale="head", softcap=20.0, alibi=True, sinks=True, **E5M2),
    "int8_packed": PagedAttentionSpec(10, 2, 64, 16, "bfloat16", kv_layout="packed", **INT8),
    "e4m3_packed": PagedAttentionSpec(32, 2, 32, 64, "bfloat16", kv_layout="packed", kv_scale="head", **E4M3),
    "int4": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", **INT4),
    "int4_MQA": PagedAttentionSpec(16, 1, 32, 1, "bfloat16", "float32", **INT4),  # heads in lanes
    "int4_no_power_float16": PagedAttentionSpec(5, 5, 6, 3, "float16", value_dim=10, **NOT_ROTATED),
    "int4_packed": PagedAttentionSpec(10, 2, 64, 16, "bfloat16", kv_layout="packed", value_dim=32, **INT4),
    "int4_packed_window": PagedAttentionSpec(3, 3, 24, 32, "float32", kv_layout="packed", window=70, **NOT_ROTATED),
    "int4_scores": PagedAttentionSpec(6, 2, 32, 8, "bfloat16", window=70, softcap=20.0, alibi=True, sinks=True, **INT4),
    "int8_rotated": PagedAttentionSpec(6, 2, 32, 5, "float32", kv_layout="HND", kv_rotation="hadamard", **INT8),
}
"""Pairs of a type with a layout, a scale, a dtype, a strategy and functions of scores: not all of them together."""
LENS = (1, 0, 33, 700, 128, 16, 129)

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
def test_decode_is_close_to_the_reference(compiled, spec):
    inputs = make_inputs(spec, LENS)
    module = compiled(spec, attend=True)
    out, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@every_spec
def test_attend_is_close_to_the_reference(compiled, spec):
    ragged = make_ragged(spec, list(zip((1, 0, 20, 31, 1, 16, 3), LENS, strict=True)), seed=1)
    assert_near_float64(spec, ragged, *ragged.attend(compiled(spec, attend=True)))


@every_spec
def test_verify_finds_nothing(compiled, spec):
    found = compiled(spec, attend=True).verify(1, seed=3)
    assert found.passed, found.failures[0]


@every_spec
def test_nothing_depends_on_threads_the_batch_or_what_is_not_seen(compiled, spec):
    inputs = make_inputs(spec, LENS, seed=4)
    module = compiled(spec, attend=True)
    out = module.decode(*inputs.arguments, **inputs.heads)
    for number, others in enumerate((1, 3, 8)):
        module.num_threads = others
        assert_same_bits(module.decode(*inputs.arguments, **inputs.heads), out)
        alone = inputs.take([number + 2])
        assert_same_bits(module.decode(*alone.arguments, **inputs.heads)[0], out[number + 2])
    poisoned = make_inputs(spec, LENS, seed=4, placement=5)  # other places, and other poison there
    assert_same_bits(module.decode(*poisoned.arguments, **poisoned.heads), out)


def code_spec(kv_dtype, dtype, **fields):
    return PagedAttentionSpec(256, 1, 256, 1, dtype, "float32", kv_dtype=kv_dtype, head_tile=1, **fields)


CODES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_dtype", OF_8_BITS)
def test_every_code_as_a_key(compiled, kv_dtype, dtype):
    """Head h has a query of 1 in element h: its score, and lse of the one token, is the number of code h."""
    spec = code_spec(kv_dtype, dtype)
    module = compiled(spec)
    query = np.eye(256, dtype=np.float32)[None].astype(make_inputs(spec, [1]).query.dtype)
    codes = CODES.view(CODE_DTYPES[kv_dtype]).reshape(1, 1, 1, 256)
    given = np.where(
        np.isnan(codes.astype(np.float32)) | np.isinf(codes.astype(np.float32)), codes.dtype.type(0), codes
    )
    scales = {name: np.full_like(scale, 0.5) for name, scale in zip(*_scales(module), strict=True)}
    arrays = (given, np.zeros_like(codes), np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    _, lse = module.decode(query, *arrays, 1.0, return_lse=True, **scales)
    np.testing.assert_array_equal(lse[0], given.ravel().astype(np.float32) / 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_dtype", OF_8_BITS)
def test_every_code_as_a_value(compiled, kv_dtype, dtype):
    """out of one token is its value: NaN and infinities of float8 too, each in its own element alone."""
    spec = code_spec(kv_dtype, dtype)
    module = compiled(spec)
    query = np.zeros((1, 256, 256), make_inputs(spec, [1]).query.dtype)
    codes = CODES.view(CODE_DTYPES[kv_dtype]).reshape(1, 1, 1, 256)
    scales = {name: np.full_like(scale, 0.5) for name, scale in zip(*_scales(module), strict=True)}
    arrays = (np.zeros_like(codes), codes, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    out = module.decode(query, *arrays, **scales)
    np.testing.assert_array_equal(out[0, 0], codes.ravel().astype(np.float32) / 2)
    np.testing.assert_array_equal(out[0], np.broadcast_to(out[0, 0], out[0].shape))


@pytest.mark.parametrize("fields", [{}, {"kv_layout": "packed"}, {"head_tile": 1}], ids=["NHD", "packed", "by head"])
def test_every_byte_of_two_codes(compiled, fields):
    """Of one token: lse is a key's number for each head that asks for one element, and out is its value."""
    spec = PagedAttentionSpec(64, 1, 512, 16, "float32", **NOT_ROTATED, **fields)
    module = compiled(spec)
    elements = np.arange(512)[:: 512 // 64] + np.arange(64) % 2
    query = np.zeros((1, 64, 512), np.float32)
    query[0, np.arange(64), elements] = 1
    codes = np.zeros((1, 16, 1, 256), np.uint8)
    codes[0, 0, 0] = np.random.default_rng(0).permutation(256)
    caches = pa_compiler.convert_cache(codes, codes, "NHD", spec.kv_layout)
    scales = {
        name: np.broadcast_to(np.float32([0.5, -3]), (1, 1, 16, 2)).copy() for name in ("key_scale", "value_scale")
    }
    arrays = (query, *caches, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    out, lse = module.decode(*arrays, 1.0, return_lse=True, **scales)
    numbers = np.stack([codes[0, 0, 0] & 15, codes[0, 0, 0] >> 4], axis=-1).ravel().astype(np.float32) / 2 - 3
    np.testing.assert_array_equal(out[0], np.broadcast_to(numbers, (64, 512)))
    np.testing.assert_array_equal(lse[0], numbers[elements])


def _scales(module):
    return ("key_scale", "value_scale"), module.empty_scales(1)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_code_of_nan_in_a_key_is_nan(compiled, kv_dtype):
    spec = code_spec(kv_dtype, "bfloat16")
    module = compiled(spec)
    key = np.full((1, 1, 1, 256), 0x7F, np.uint8).view(CODE_DTYPES[kv_dtype])
    query = np.ones((1, 256, 256), make_inputs(spec, [1]).query.dtype)
    arrays = (key, np.zeros_like(key), np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    scales = dict(zip(*_scales(module), strict=True))
    out, lse = module.decode(query, *arrays, return_lse=True, **scales)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def causal_and_odd(batch, head, query_pos, key_pos):
    return (key_pos % 3 != 1) & (key_pos <= query_pos)


def halved(score, batch, head, query_pos, key_pos):
    return score * 0.5 - 0.01 * (query_pos - key_pos)


@pytest.mark.parametrize("fields", [INT8, E4M3], ids=["int8", "e4m3"])
def test_functions_of_scores_see_scaled_scores(compiled, fields):
    spec = PagedAttentionSpec(8, 2, 32, 16, "bfloat16", score_mod=halved, mask_mod=causal_and_odd, **fields)
    found = compiled(spec, attend=True).verify(2, seed=5)
    assert found.passed, found.failures[0]


@pytest.mark.parametrize("fields", [INT4, E5M2], ids=["int4", "e5m2"])
def test_a_shared_prefix_and_the_same_bits_of_an_invariant_spec(compiled, fields):
    spec = PagedAttentionSpec(8, 2, 32, 16, "bfloat16", **fields)
    assert compiled(spec, attend=True, shared_prefix=True, merge_states=True).verify(2, seed=6).passed
    invariant = dataclasses.replace(spec, invariant=True)
    module, inputs = compiled(invariant, attend=True), make_inputs(invariant, [40, 300])
    assert module.verify(1, seed=7).passed
    starts = np.array([0, 1, 2], np.int32)
    decoded = module.decode(*inputs.arguments, **inputs.heads)
    assert_same_bits(module.attend(*inputs.arguments, starts, **inputs.heads), decoded)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("e4m3", "x86-64"),
        ("int8_packed", "x86-64"),
        ("e5m2", "x86-64-v3"),
        ("int4", "x86-64-v3"),
        ("int8", "x86-64-v4"),
        ("e4m3_packed", "x86-64-v4"),
        ("int8", "cooperlake"),
        ("int8_packed", "cooperlake"),
        ("e4m3", "cooperlake"),
        ("e4m3_packed", "cooperlake"),
    ],
)
def test_other_instruction_sets(compiled, name, target):
    """Codes become float32 there, and on cooperlake, which has vdpbf16ps and no AMX, pairs of bfloat16."""
    spec = dataclasses.replace(SPECS[name], dtype="bfloat16")
    inputs = make_inputs(spec, LENS, seed=8)
    module = compiled(spec, target={"kind": "llvm", "mcpu": target})
    if missing := missing_features(module.manifest.features):
        pytest.skip(f"this CPU lacks {' '.join(missing)}")
    out, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)
