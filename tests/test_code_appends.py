"""append_kv into caches of codes: bit for bit as NumPy and ml_dtypes have them, with scales that it reads or makes."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import DTYPES
from integer_rows import DEFINED
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.verification.codes import CODE_DTYPES, quantised

DIM = 128


def every_number(dtype):
    """All numbers of a type of 16 bits, infinities and NaN too; of float32 those that are around a rounding."""
    if dtype != "float32":
        return np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 1 << 32, 1 << 15, dtype=np.uint32).view(np.float32)
    halves = np.concatenate([np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for dtype in _FLOAT8])
    between = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(between, np.float32(end)) for end in (-np.inf, np.inf)]
    ordinary = rng.standard_normal(1 << 14).astype(np.float32)
    numbers = np.concatenate([any_bits, halves, between, *near, ordinary])
    return np.resize(numbers, -(-len(numbers) // DIM) * DIM)


_FLOAT8 = [CODE_DTYPES[name] for name in ("float8_e4m3fn", "float8_e5m2")]


def append(module, key, value, scales):
    """(caches in NHD, scales) after append_kv of tokens into the slots from 0 on."""
    block_size = module.spec.block_size
    blocks = -(-len(key) // block_size)
    caches = module.empty_cache(blocks)
    given = dict(zip(("key_scale", "value_scale"), scales or module.empty_scales(blocks), strict=True))
    module.append_kv(key, value, *caches, np.arange(len(key)), **given)
    in_order = pa_compiler.convert_cache(*caches, module.spec.kv_layout, "NHD")
    return [cache.reshape(-1, *cache.shape[2:])[: len(key)] for cache in in_order], list(given.values())


every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30, 2.0**-140, 0.0, np.inf, np.nan, -2.0])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_number_as_float8(compiled, kv_dtype, dtype, scale):
    spec = PagedAttentionSpec(1, 1, DIM, 16, dtype, kv_dtype=kv_dtype)
    numbers = every_number(dtype).reshape(-1, 1, DIM)
    scales = [np.array([each], np.float32) for each in (scale, 1.0)]
    (keys, values), _ = append(compiled(spec), numbers, numbers[::-1], scales)
    with np.errstate(all="ignore"):
        for cache, new, of in ((keys, numbers, scales[0]), (values, numbers[::-1], scales[1])):
            _assert_same_codes(cache, quantised(new, kv_dtype, of).codes)


def _assert_same_codes(found, expected):
    """The same bytes, but that a NaN may have either sign: that of 0 / 0 is the CPU's."""
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)
    assert_same_bits(np.where(is_nan, 0, found.view(np.uint8)), np.where(is_nan, 0, expected.view(np.uint8)))


@pytest.mark.scorecard(27)
def test_every_float32_number_as_float8(compiled, count, figure):
    """With --soak all 2^32 of them, else some, which are anywhere among them."""
    module = compiled(PagedAttentionSpec(1, 1, DIM, 16, "float32", kv_dtype="float8_e4m3fn"))
    all_numbers, at_once = count(1 << 20, 1 << 32), 1 << 20
    scales = [np.ones(1, np.float32)] * 2
    for begin in range(0, all_numbers, 2 * at_once):
        bits = np.arange(begin, min(begin + 2 * at_once, all_numbers), dtype=np.uint64).astype(np.uint32)
        numbers = (bits * np.uint32(2654435761)).view(np.float32)  # odd: each number once
        keys, values = np.split(numbers.reshape(-1, 1, DIM), 2)
        caches, _ = append(module, keys, values, scales)
        with np.errstate(all="ignore"):
            for cache, new in zip(caches, (keys, values), strict=True):
                _assert_same_codes(cache, quantised(new, "float8_e4m3fn", scales[0]).codes)
    figure("numbers", all_numbers)


OF_ROWS = [("int8", "none"), ("int8", "hadamard"), ("int4", "none"), ("int4", "hadamard")]


@pytest.mark.parametrize(("dtype", "kv_layout"), [*((dtype, "NHD") for dtype in DTYPES), ("bfloat16", "packed")])
@pytest.mark.parametrize(("kv_dtype", "kv_rotation"), OF_ROWS)
@pytest.mark.parametrize("order", ["by magnitude", "any"])
def test_every_number_in_rows_with_a_scale(compiled, order, kv_dtype, kv_rotation, kv_layout, dtype):
    """In rows of numbers of about one size, and in rows of any, most of which have an infinity or a NaN."""
    fields = {"kv_layout": kv_layout, "kv_dtype": kv_dtype, "kv_rotation": kv_rotation}
    spec = PagedAttentionSpec(2, 2, DIM, 16, dtype, **fields)
    numbers = every_number(dtype)
    rng = np.random.default_rng(1)
    with np.errstate(invalid="ignore"):  # signalling NaN
        by_magnitude = np.argsort(np.abs(numbers.astype(np.float64)))
    places = by_magnitude if order == "by magnitude" else rng.permutation(len(numbers))
    rows = np.resize(numbers[places], 2 * (len(numbers) // DIM) * DIM).reshape(-1, 2, DIM)
    (keys, values), scales = append(compiled(spec), rows, rows[::-1], None)
    for cache, scale, new in ((keys, scales[0], rows), (values, scales[1], rows[::-1])):
        expected = quantised(new, kv_dtype, rotates=spec.rotates)
        assert_same_bits(cache, expected.codes)
        made = scale.swapaxes(1, 2).reshape(-1, *expected.scale.shape[1:])[: len(rows)]
        np.testing.assert_array_equal(made, expected.scale)


@pytest.mark.parametrize(("row", "codes", "scale"), DEFINED.values(), ids=DEFINED)
def test_defined_rows_of_int8(compiled, row, codes, scale):
    spec = PagedAttentionSpec(1, 1, 3, 1, "float32", kv_dtype="int8")
    new = np.array(row, np.float32).reshape(1, 1, 3)
    (keys, _), (key_scale, _) = append(compiled(spec), new, new, None)
    assert keys.ravel().tolist() == codes
    np.testing.assert_array_equal(key_scale.ravel(), np.float32(scale))


ROWS_OF_INT4 = {
    "zeros": ([0.0, -0.0, 0.0, 0.0], [0, 0, 0, 0], (0.0, 0.0)),
    "equal numbers": ([3.0, 3.0, 3.0, 3.0], [0, 0, 0, 0], (0.0, 3.0)),
    "0 to 15": ([0.0, 15.0, 7.0, 1.0], [0, 15, 7, 1], (1.0, 0.0)),
    "ties": ([-1.0, 14.0, 1.5, 0.5], [0, 15, 2, 2], (1.0, -1.0)),  # 2.5 and 1.5 of a scale: to the even
    "a scale of 0": ([2.0**-149, 0.0, 0.0, 0.0], [0, 0, 0, 0], (0.0, 0.0)),
    "subnormal": ([15 * 2.0**-149, 0.0, 2.0**-149, 0.0], [15, 0, 1, 0], (2.0**-149, 0.0)),
    "an infinity": ([np.inf, 1.0, 2.0, 3.0], [0, 0, 0, 0], (np.inf, np.inf)),
    "two infinities": ([np.inf, np.inf, np.inf, np.inf], [0, 0, 0, 0], (np.nan, np.nan)),
    "NaN": ([np.nan, 1.0, np.inf, 2.0], [0, 0, 0, 0], (np.nan, np.nan)),
    "a range beyond float32": ([3.4e38, -3.4e38, 1.0, 1.0], [0, 0, 0, 0], (np.inf, np.inf)),
}


@pytest.mark.parametrize(("row", "codes", "scale"), ROWS_OF_INT4.values(), ids=ROWS_OF_INT4)
def test_defined_rows_of_int4(compiled, row, codes, scale):
    spec = PagedAttentionSpec(1, 1, 4, 1, "float32", kv_dtype="int4", kv_rotation="none")
    new = np.array(row, np.float32).reshape(1, 1, 4)
    (keys, _), (key_scale, _) = append(compiled(spec), new, new, None)
    assert keys.ravel().tolist() == [codes[0] | codes[1] << 4, codes[2] | codes[3] << 4]
    np.testing.assert_array_equal(key_scale.ravel(), np.float32(scale))


def test_a_packed_value_leaves_the_other_half_of_its_bytes(compiled):
    """Two slots side by side share bytes of values, whichever of them is written last."""
    spec = PagedAttentionSpec(2, 2, 32, 16, "float32", kv_layout="packed", kv_dtype="int4")
    module, rng = compiled(spec), np.random.default_rng(3)
    new = rng.standard_normal((16, 2, 32)).astype(np.float32)
    found = []
    for order in (np.arange(16), np.arange(16)[::-1]):
        caches, scales = module.empty_cache(1), module.empty_scales(1)
        for slot in order:
            one = new[slot : slot + 1]
            module.append_kv(one, one, *caches, np.array([slot]), key_scale=scales[0], value_scale=scales[1])
        found.append(caches)
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)
    values = pa_compiler.convert_cache(*found[0], "packed", "NHD")[1][0]
    assert_same_bits(values, quantised(new, "int4", rotates=True).codes)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_of_two_tokens_with_a_slot_the_later_stays(compiled, threads):
    spec = PagedAttentionSpec(8, 8, 64, 16, "bfloat16", kv_dtype="int8")
    module = compiled(spec)
    module.num_threads = threads
    rng = np.random.default_rng(2)
    new = rng.standard_normal((3000, 8, 64)).astype(DTYPES["bfloat16"])
    caches, scales = module.empty_cache(2), module.empty_scales(2)
    slots = rng.integers(-1, 32, 3000)
    module.append_kv(new, new, *caches, slots, key_scale=scales[0], value_scale=scales[1])
    last = {slot: number for number, slot in enumerate(slots.tolist()) if slot >= 0}
    for slot, number in last.items():
        expected = quantised(new[number], "int8")
        assert_same_bits(caches[0][slot // 16, slot % 16], expected.codes)
        assert_same_bits(scales[1][slot // 16, :, slot % 16], expected.scale)
