"""append_kv into caches of codes on CUDA, run on the emulator: bit for bit as NumPy and ml_dtypes have them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cuda_kernels import aligned, as_kept, build_others, cache_strides, scale_strides, strides
from inputs import DTYPES
from integer_rows import DEFINED
from test_code_appends import every_number
from test_cuda_append import rows
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda.kernels.check import BAD_SLOT, VIOLATION
from pa_compiler.verification.codes import CODE_DTYPES, quantised

INT8, E4M3, E5M2 = ({"kv_dtype": name} for name in ("int8", "float8_e4m3fn", "float8_e5m2"))
FLOAT8 = (E4M3["kv_dtype"], E5M2["kv_dtype"])

SPECS = {
    "int8": PagedAttentionSpec(6, 3, 48, 5, "bfloat16", **INT8),
    "int8_longer_keys": PagedAttentionSpec(8, 2, 256, 16, "float32", kv_layout="HND", value_dim=16, **INT8),
    "int8_longer_values": PagedAttentionSpec(5, 5, 16, 1, "float16", value_dim=208, **INT8),
    "e4m3": PagedAttentionSpec(6, 3, 96, 5, "float16", **E4M3),
    "e5m2_of_heads": PagedAttentionSpec(8, 2, 80, 16, "float32", kv_layout="HND", kv_scale="head", **E5M2),
}
"""Every type with both layouts; rows that fill their lanes, more than once, and rows that do not."""
NUM_BLOCKS = 40

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(scope="module")
def kernels(emulated):
    return functools.cache(functools.partial(build_others, emulated))


def drawn_scales(spec, num_blocks, rng):
    """Scales that append_kv reads, or other numbers in the place of those that it makes."""
    shape = [num_blocks if isinstance(extent, str) else extent for extent in spec.scale_shape]
    return [((rng.random(shape) + 0.5) / 100).astype(np.float32) for _ in range(2)]


def append(kernels, spec, key, value, slots, num_blocks, scales, *, status=0, order="forward"):
    """(caches, scales) after append_kv of tokens to slots of caches of 0x55; scales are those before it."""
    shapes = (spec.key_cache_shape, spec.value_cache_shape)
    caches = [
        aligned(np.full((num_blocks, *shape[1:]), 0x55, np.uint8).view(CODE_DTYPES[spec.kv_dtype])) for shape in shapes
    ]
    given = {name: scale.copy() for name, scale in zip(("key_scale", "value_scale"), scales, strict=True)}
    for scale in given.values():
        scale.flags.writeable = spec.token_scales
    key, value = aligned(key), aligned(value)
    bits = f"u{key.itemsize}"
    arguments = {
        "key": key.view(bits),
        "value": value.view(bits),
        "key_cache": as_kept(spec, caches[0]),
        "value_cache": as_kept(spec, caches[1]),
        "slot_mapping": np.asarray(slots, np.int64),
        "status": np.array([status], np.int32),
        "report": np.zeros(5, np.int64),
        "num_blocks": num_blocks,
        "num_tokens": len(slots),
        **given,
        **scale_strides(spec, given),
        **strides(key, key_token=0, key_head=1),
        **strides(value, value_token=0, value_head=1),
        **cache_strides(spec, "k", caches[0]),
        **cache_strides(spec, "v", caches[1]),
    }
    kernels(spec).launch("cuda_append_kv", arguments, order)
    return caches, list(given.values())


def assert_as_in_numpy(spec, news, slots, before, after):
    """Codes and scales of the slots that are named last, and all others as they were."""
    at = {slot: token for token, slot in enumerate(slots) if slot >= 0}
    tokens, places = np.array([*at.values()], int), np.array([*at], int)
    block, slot = places // spec.block_size, places % spec.block_size
    for new, cache, scale, made in zip(news, *after[:1], before, after[1], strict=True):
        of_heads = None if spec.token_scales else scale[:, None]
        codes, scales = quantised(new[tokens], spec.kv_dtype, of_heads)
        expected = np.full(cache.shape, 0x55, np.uint8)
        rows(spec, expected)[block, slot] = codes.view(np.uint8)
        assert_same_codes(cache, expected.view(cache.dtype))
        held = scale.copy()
        if spec.token_scales:
            held[block, :, slot] = scales
        np.testing.assert_array_equal(made, held)


def assert_same_codes(found, expected):
    """The same bytes, but that a NaN may have either sign: that of 0 / 0 is the machine's."""
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)
    assert_same_bits(np.where(is_nan, 0, found.view(np.uint8)), np.where(is_nan, 0, expected.view(np.uint8)))


@every_spec
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 300])
def test_append(kernels, spec, num_tokens, order):
    """Both ends of the caches, slots that occur again near and far, every fourth token skipped."""
    rng, num_slots = np.random.default_rng(num_tokens), NUM_BLOCKS * spec.block_size
    slots = rng.integers(0, num_slots, num_tokens)
    slots[:2] = [0, num_slots - 1][:num_tokens]
    slots[3::4] = -1
    both = rng.standard_normal((num_tokens, spec.num_kv_heads, spec.head_dim + spec.result_dim))
    news = np.split(both.astype(DTYPES[spec.dtype]), [spec.head_dim], axis=-1)
    scales = drawn_scales(spec, NUM_BLOCKS, rng)
    after = append(kernels, spec, *news, slots, NUM_BLOCKS, scales, order=order)
    assert_as_in_numpy(spec, news, slots.tolist(), scales, after)


@every_spec
def test_a_status_stops_append(kernels, spec):
    scales = drawn_scales(spec, NUM_BLOCKS, np.random.default_rng(0))
    news = [np.ones((2, spec.num_kv_heads, dim), DTYPES[spec.dtype]) for dim in (spec.head_dim, spec.result_dim)]
    caches, made = append(kernels, spec, *news, [3, 4], NUM_BLOCKS, scales, status=VIOLATION - BAD_SLOT)
    assert all((cache.view(np.uint8) == 0x55).all() for cache in caches)
    for one, same in zip(made, scales, strict=True):
        assert_same_bits(one, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30, 2.0**-140, 0.0, np.inf, np.nan, -2.0])
@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_every_number_as_float8(kernels, kv_dtype, dtype, scale):
    spec = PagedAttentionSpec(1, 1, 128, 16, dtype, kv_dtype=kv_dtype)
    numbers = every_number(dtype).reshape(-1, 1, 128)
    blocks, slots = -(-len(numbers) // 16), np.arange(len(numbers))
    scales, news = [np.array([each], np.float32) for each in (scale, 1.0)], (numbers, numbers[::-1])
    with np.errstate(all="ignore"):
        after = append(kernels, spec, *news, slots, blocks, scales)
        assert_as_in_numpy(spec, news, slots.tolist(), scales, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["by magnitude", "any"])
def test_every_number_in_rows_of_int8(kernels, order, dtype):
    """In rows of numbers of about one size, and in rows of any, most of which have an infinity or a NaN."""
    spec, rng = PagedAttentionSpec(2, 2, 128, 16, dtype, **INT8), np.random.default_rng(1)
    numbers = every_number(dtype)
    with np.errstate(all="ignore"):
        by_magnitude = np.argsort(np.abs(numbers.astype(np.float64)))
        places = by_magnitude if order == "by magnitude" else rng.permutation(len(numbers))
        new = np.resize(numbers[places], 2 * (len(numbers) // 128) * 128).reshape(-1, 2, 128)
        blocks, slots, news = -(-len(new) // 16), np.arange(len(new)), (new, new[::-1])
        scales = drawn_scales(spec, blocks, rng)
        after = append(kernels, spec, *news, slots, blocks, scales)
        assert_as_in_numpy(spec, news, slots.tolist(), scales, after)


@pytest.mark.parametrize(("row", "codes", "scale"), DEFINED.values(), ids=DEFINED)
def test_defined_rows_of_int8(kernels, row, codes, scale):
    spec = PagedAttentionSpec(1, 1, 16, 1, "float32", **INT8)
    new = np.zeros((1, 1, 16), np.float32)
    new[..., :3] = row
    (keys, _), (key_scale, _) = append(kernels, spec, new, new, [0], 1, [np.ones((1, 1, 1), np.float32)] * 2)
    assert keys.ravel().tolist() == codes + [0] * 13
    np.testing.assert_array_equal(key_scale.ravel(), np.float32(scale))
