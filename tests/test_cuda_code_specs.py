"""Caches of codes on CUDA, run on the emulator: attend, batches, tiles, ends of the range of scales, and scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_kernels import aligned, on_device
from inputs import make_inputs
from ragged_inputs import assert_near_float64, drawn_trees
from test_cuda_attend import SEQUENCES, ragged
from test_cuda_codes import KINDS, LENGTHS
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.tiles import Element

SPECS = {
    "int8_mma": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", **KINDS["int8"]),
    "int8_fma": PagedAttentionSpec(4, 2, 48, 5, "float16", kv_layout="HND", **KINDS["int8"]),
    "e4m3_mma": PagedAttentionSpec(12, 1, 96, 5, "float16", kv_layout="HND", **KINDS["e4m3"]),
    "e4m3_fma": PagedAttentionSpec(4, 2, 64, 16, "float32", **KINDS["e4m3_of_heads"]),
    "e5m2_mma": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", **KINDS["e5m2_of_heads"]),
}
"""Every strategy and every way in which scales come in."""

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
@pytest.mark.parametrize("causal", [True, False])
def test_attend(cuda_attend, spec, causal):
    call = ragged(spec, SEQUENCES, causal=causal)
    assert_near_float64(spec, call, *cuda_attend(spec).attend(call, workers=7))


@every_spec
def test_trees(cuda_attend, spec):
    tree = drawn_trees([count for count, _ in SEQUENCES], np.random.default_rng(3))
    call = ragged(spec, SEQUENCES, tree_mask=tree)
    assert_near_float64(spec, call, *cuda_attend(spec).attend(call, order="reverse"))


def rows_of(spec, inputs, cache, tokens):
    """A view of a cache, or of scales of tokens, and the index of tokens of the first sequence in it."""
    in_order = cache if spec.kv_layout == "NHD" and cache.ndim == 4 else cache.swapaxes(1, 2)
    return in_order, (inputs.block_table[0, tokens // spec.block_size], tokens % spec.block_size)


@every_spec
def test_poison_in_later_query_tokens(cuda_attend, spec):
    """What the codes and the scales of a token are is nothing to the query tokens before it, in no bit."""
    call = ragged(spec, [(5, 70)])
    expected = cuda_attend(spec).attend(call)
    poison = {"int8": 0x80, "float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C}[spec.kv_dtype]
    for cache in (call.inputs.key_cache, call.inputs.value_cache):
        in_order, at = rows_of(spec, call.inputs, cache.view(np.uint8), np.array([67]))
        in_order[at] = poison
    for name, scale in call.inputs.heads.items() if spec.token_scales else ():
        in_order, at = rows_of(spec, call.inputs, scale, np.array([67]))
        in_order[at] = {"key_scale": np.nan, "value_scale": np.inf}[name]
    actual = cuda_attend(spec).attend(call)
    for one, same in zip(actual, expected, strict=True):
        assert_same_bits(one[:2], same[:2])
    assert np.isnan(actual[1][2:]).all() or spec.kv_dtype == "float8_e5m2"


@every_spec
@pytest.mark.parametrize("workers", [1, 100])
def test_a_sequence_in_any_batch(cuda_decode, spec, workers):
    kernels = cuda_decode(spec, most_ranges=3)
    inputs = on_device(make_inputs(spec, [900, 1, 300, 0, 257, 1700]))
    expected = kernels.decode(inputs, workers=7)
    for order in ([0], [5], [4, 3, 5, 0], [1] * 40 + [5, 2]):
        for actual, same in zip(kernels.decode(inputs.take(order), workers=workers), expected, strict=True):
            assert_same_bits(actual, same[order])
    for other in (kernels.decode(inputs, order="reverse"), kernels.decode(moved(spec, inputs))):
        for actual, same in zip(other, expected, strict=True):
            assert_same_bits(actual, same)


def moved(spec, inputs):
    """The same with more between blocks, and between the scales of tokens: in other strides."""
    arrays = {}
    for name in ("key_cache", "value_cache"):
        cache = getattr(inputs, name)
        apart = aligned(np.zeros((len(cache), 3, *cache.shape[1:]), cache.dtype))
        apart[:, 1] = cache
        arrays[name] = apart[:, 1]
    heads = {}
    for name, scale in inputs.heads.items():
        wide = np.full((*scale.shape, 3), np.nan, np.float32)
        wide[..., 1] = scale
        heads[name] = wide[..., 1] if spec.scales_of == "head" else np.ascontiguousarray(wide[..., 1])
        if spec.token_scales:
            heads[name] = np.ascontiguousarray(scale.T).T
    return inputs.replace(heads=heads, **arrays)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("int8_mma", {"warps": 1, "stages": 3, "tile_tokens": 16, "range_tokens": 32}),
        ("e4m3_mma", {"warps": 2, "stages": 2, "tile_tokens": 32, "range_tokens": 64}),
        ("e4m3_fma", {"warps": 2, "stages": 4, "tile_tokens": 16, "range_tokens": 32, "most_ranges": 2}),
    ],
)
def test_other_tilings(cuda_decode, name, sizes):
    inputs = on_device(make_inputs(SPECS[name], [200, 0, 31, 77]))
    assert_close_to_oracle(SPECS[name], inputs, *cuda_decode(SPECS[name], **sizes).decode(inputs, workers=3))


def ordinary(scales):
    """Scales with 1 in the place of garbage, which may be too large for a power of two more."""
    return np.where((scales > 0) & (scales < 1), scales, np.float32(1))


@every_spec
@pytest.mark.parametrize("power", [-100, -20, 40, 100])
def test_powers_of_two_go_from_scales_of_keys_to_the_scale(cuda_decode, spec, power):
    """The same bits, where the one would leave float16, or products without it float32."""
    inputs = on_device(make_inputs(spec, [90, 1, 600]))
    heads = inputs.heads | {"key_scale": np.ldexp(ordinary(inputs.heads["key_scale"]), power)}
    expected = cuda_decode(spec).decode(inputs, scale=-0.3)
    actual = cuda_decode(spec).decode(inputs.replace(heads=heads), scale=-0.3 * 2.0**-power)
    for one, same in zip(actual, expected, strict=True):
        assert_same_bits(one, same)


@every_spec
@pytest.mark.parametrize("power", [-60, 60])
def test_powers_of_two_of_scales_of_values_are_those_of_out(cuda_decode, spec, power):
    spec = dataclasses.replace(spec, out_dtype="float32")
    inputs = on_device(make_inputs(spec, [90, 1, 600]))
    heads = inputs.heads | {"value_scale": np.ldexp(ordinary(inputs.heads["value_scale"]), power)}
    expected, lse = cuda_decode(spec).decode(inputs)
    actual, same_lse = cuda_decode(spec).decode(inputs.replace(heads=heads))
    assert_same_bits(actual, expected * np.float32(2.0**power))
    assert_same_bits(same_lse, lse)


@every_spec
def test_the_largest_values(cuda_decode, spec):
    """An average of numbers near the end of float32 is one of the numbers between them, in ranges that are joined.

    Where weights are rounded to bfloat16, it may be larger by 2**-9.
    """
    spec = dataclasses.replace(spec, out_dtype="float32")
    inputs = on_device(make_inputs(spec, [0, 1, 2, 17, 300, 1000]))
    largest = {"int8": 127, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[spec.kv_dtype]
    inputs.value_cache[...] = np.random.default_rng(0).choice([-1, 1, 1, 1], inputs.value_cache.shape) * largest
    heads = inputs.heads | {"value_scale": np.full_like(inputs.heads["value_scale"], 3.3e38 / largest)}
    inputs = inputs.replace(heads=heads)
    out, lse = cuda_decode(spec).decode(inputs)
    assert np.isfinite(out).all()
    assert_close_to_oracle(spec, inputs, out, lse)


@pytest.mark.parametrize("name", ["e4m3_mma", "e4m3_fma"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_an_empty_sequence_is_empty_whatever_the_scale_is(cuda_decode, name, scale):
    inputs = on_device(make_inputs(SPECS[name], [0, 5]))
    heads = {name: np.full_like(each, scale) for name, each in inputs.heads.items()}
    out, lse = cuda_decode(SPECS[name]).decode(inputs.replace(heads=heads))
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()
    assert np.isnan(out[1]).all()


SCORES = {"window": 100, "softcap": 1.5, "alibi": True, "sinks": True}


def by_head(batch, head, query_pos, key_pos):
    return (key_pos % 3 != head % 2) & (key_pos <= query_pos)


def odd(batch, head, query_pos, key_pos):
    return (key_pos % 3 != 1) & (key_pos <= query_pos)


FUNCTIONS = {"scores": SCORES, "mask": {"mask_mod": odd}, "mask_by_head": {"mask_mod": by_head}}


@pytest.mark.parametrize("fields", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", ["int8_mma", "int8_fma", "e4m3_mma"])
def test_score_functions_see_scaled_scores(cuda_decode, name, fields):
    spec = dataclasses.replace(SPECS[name], **fields)
    inputs = on_device(make_inputs(spec, LENGTHS))
    out, lse = cuda_decode(spec).decode(inputs, scale=4.0)
    assert_close_to_oracle(spec, inputs, out, lse, 4.0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_which_gpus_have_an_instruction_for_float8(arch):
    tiling = cuda_tiling.choose(SPECS["e4m3_mma"], arch)
    assert tiling.element == Element("float8_e4m3fn", arch not in ("sm_80", "sm_86"))
