"""decode on CUDA, run on the emulator: the emitted kernels against the oracle, with poison wherever none is read."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from cuda_kernels import aligned, on_device
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels.check import BAD_LENGTH, VIOLATION

MAP_NORESERVE = 0x4000

SPECS = {
    "group_of_4": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "group_of_12_in_hnd": PagedAttentionSpec(12, 1, 96, 5, "float16", kv_layout="HND"),
    "tiles_of_13_heads": PagedAttentionSpec(25, 1, 16, 1, "bfloat16", out_dtype="float32"),
    "one_head_of_80": PagedAttentionSpec(2, 2, 80, 32, "float16"),
    "float32": PagedAttentionSpec(4, 2, 64, 16, "float32"),
    "float32_in_tiles": PagedAttentionSpec(5, 1, 48, 7, "float32", out_dtype="bfloat16"),
}
"""Every strategy; rows that are swizzled and rows that are padded; tiles of heads of which the last is short."""

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 0, 300, 700)

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
one_of_each_strategy = pytest.mark.parametrize("spec", [SPECS["group_of_4"], SPECS["float32"]], ids=["mma", "fma"])


@every_spec
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_decode(cuda_decode, spec, order):
    inputs = on_device(make_inputs(spec, LENGTHS))
    out, lse = cuda_decode(spec).decode(inputs, workers=8, order=order)
    assert_close_to_oracle(spec, inputs, out, lse)


@one_of_each_strategy
@pytest.mark.parametrize("poison", POISONS)
def test_poison(cuda_decode, spec, poison):
    inputs = on_device(make_inputs(spec, [1, 20, 0, 67], poison=poison))
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs))


@one_of_each_strategy
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 100])
def test_any_number_of_workers(cuda_decode, spec, workers):
    inputs = on_device(make_inputs(spec, [1000, 3, 0, 513, 256]))
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs, workers=workers))


@one_of_each_strategy
def test_sequences_are_cut_as_explain_counts(cuda_decode, spec):
    """cuda_tiling.ranges and the kernels: a sequence of several ranges leaves a partial result of each."""
    kernels, lengths = cuda_decode(spec, most_ranges=3), [1000, 3, 0, 513, 256, 257, 700, 1700]
    arguments = kernels.arguments(on_device(make_inputs(spec, lengths)), workers=5)
    kernels.launch("cuda_decode", arguments)
    counts = np.array(cuda_tiling.ranges(spec, kernels.tiling, lengths))
    assert counts.tolist() == [2, 1, 1, 3, 1, 2, 3, 2]
    expected = (np.arange(len(arguments["partial_max"]))[:, None] < counts) & (counts > 1)
    np.testing.assert_array_equal(~np.isnan(arguments["partial_max"]).any(axis=2), expected)


@one_of_each_strategy
@pytest.mark.parametrize("workers", [1, 4, 100])
def test_a_sequence_in_any_batch(cuda_decode, spec, workers):
    """Alone, beside long and short ones, in any place, by any number of workers: the same bits."""
    kernels = cuda_decode(spec, most_ranges=3)  # which the longest exceeds
    inputs = on_device(make_inputs(spec, [900, 1, 300, 0, 257, 1700]))
    expected = kernels.decode(inputs, workers=7)
    for order in ([0], [5], [2, 2, 2], [4, 3, 5, 0], [5, 4, 3, 2, 1, 0], [1] * 40 + [5, 2]):
        for actual, same in zip(kernels.decode(inputs.take(order), workers=workers), expected, strict=True):
            assert_same_bits(actual, same[order])


@one_of_each_strategy
@pytest.mark.parametrize("batch", [1, 31, 32, 33, 70])
def test_batches_around_a_warp(cuda_decode, spec, batch):
    lengths = np.random.default_rng(batch).integers(0, 40, batch)
    lengths[-1] = 600  # in ranges, behind all others
    inputs = on_device(make_inputs(spec, lengths))
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs, workers=4))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("group_of_4", {"warps": 1, "stages": 3, "tile_tokens": 32, "range_tokens": 32}),
        ("float32", {"warps": 2, "stages": 2, "tile_tokens": 16, "range_tokens": 32, "most_ranges": 2}),
    ],
)
def test_other_tilings(cuda_decode, name, sizes):
    inputs = on_device(make_inputs(SPECS[name], [200, 0, 31, 77]))
    assert_close_to_oracle(SPECS[name], inputs, *cuda_decode(SPECS[name], **sizes).decode(inputs, workers=3))


@one_of_each_strategy
def test_strides(cuda_decode, spec):
    """A query that is part of a larger array, caches whose blocks lie apart, and an out with room between heads."""
    inputs = on_device(make_inputs(spec, [40, 300]))
    expected = cuda_decode(spec).decode(inputs)
    query = aligned(np.full((2, spec.num_heads + 3, 2 * spec.head_dim), np.nan, inputs.query.dtype))
    query[:, 1 : spec.num_heads + 1, : spec.head_dim] = inputs.query
    caches = {}
    for name in ("key_cache", "value_cache"):
        cache = getattr(inputs, name)
        apart = aligned(np.full((len(cache), 3, *cache.shape[1:]), np.nan, cache.dtype))
        apart[:, 1] = cache
        caches[name] = apart[:, 1]
    strided = inputs.replace(query=query[:, 1 : spec.num_heads + 1, : spec.head_dim], **caches)
    for actual, same in zip(cuda_decode(spec).decode(strided), expected, strict=True):
        assert_same_bits(actual, same)


@one_of_each_strategy
def test_offsets_over_32_bits(cuda_decode, spec):
    """Blocks of which the last begins more than 2**32 elements after the first."""
    inputs = on_device(make_inputs(spec, [70, 9], spare_blocks=0))
    far = {}
    for name in ("key_cache", "value_cache"):
        cache = getattr(inputs, name)
        stride = -(-(1 << 32) // (len(cache) - 1)) // 8 * 8 + 8
        region = mmap.mmap(
            -1, len(cache) * stride * cache.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        )
        blocks = np.frombuffer(region, cache.dtype).reshape(len(cache), stride)[:, : cache[0].size]
        far[name] = np.lib.stride_tricks.as_strided(
            blocks, cache.shape, (blocks.strides[0], *cache.strides[1:]), writeable=True
        )
        far[name][...] = cache
    out, lse = cuda_decode(spec).decode(inputs.replace(**far))
    assert_close_to_oracle(spec, inputs, out, lse)


@one_of_each_strategy
def test_a_status_stops_everything(cuda_decode, spec):
    out, lse = cuda_decode(spec).decode(on_device(make_inputs(spec, [3, 700])), status=VIOLATION - BAD_LENGTH)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@one_of_each_strategy
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(cuda_decode, spec, scale):
    inputs = on_device(make_inputs(spec, [90, 300]))
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs, scale=scale), scale=scale)


def rows_of(inputs, sequence, tokens):
    """(blocks, slots) of tokens of a sequence."""
    size = inputs.key_cache.shape[1]
    return inputs.block_table[sequence, tokens // size], tokens % size


@one_of_each_strategy
def test_scores_of_minus_infinity_weigh_nothing(cuda_decode, spec):
    """Before and after others, in whole ranges of a sequence too; a sequence of nothing else is as an empty one."""
    inputs = on_device(make_inputs(spec, [300, 20, 300, 700]))
    inputs.query[...] = np.abs(inputs.query) + 1
    inputs.key_cache[...] = np.abs(inputs.key_cache)
    for sequence, tokens in enumerate((np.arange(257), np.arange(20), np.arange(30, 300), np.arange(700))):
        inputs.key_cache[rows_of(inputs, sequence, tokens)] = -np.inf
    out, lse = cuda_decode(spec).decode(inputs, scale=0.1)
    assert not out[[1, 3]].any()
    assert np.isneginf(lse[[1, 3]]).all()
    assert_close_to_oracle(spec, inputs, out, lse, scale=0.1)


@one_of_each_strategy
def test_not_a_number(cuda_decode, spec):
    """NaN in a query is NaN in its row, NaN in a value NaN in its column, and infinity in the last value infinity."""
    inputs = on_device(make_inputs(spec, [77, 21]))
    inputs.query[0, 1, 3] = np.nan
    last = rows_of(inputs, 1, np.array([20]))
    inputs.value_cache[(*last, 0, 5)] = np.nan
    inputs.value_cache[(*last, 0, 6)] = np.inf
    out, lse = cuda_decode(spec).decode(inputs)
    others = np.arange(spec.num_heads) != 1
    assert np.isnan(out[0, 1]).all()
    assert np.isnan(lse[0, 1])
    assert np.isfinite(out[0, others]).all()
    assert np.isnan(out[1, : spec.group, 5]).all()
    assert np.isposinf(out[1, : spec.group, 6]).all()
    assert np.isfinite(np.delete(out[1, : spec.group], (5, 6), axis=1)).all()
    assert np.isfinite(out[1, spec.group :]).all()
    assert np.isfinite(lse[1]).all()


@pytest.mark.parametrize("scale", [1.0, 1e-38])
def test_scores_at_both_ends_of_float32(cuda_decode, scale):
    """Scores of up to 3e38 are ordinary numbers: one token takes all, or more than others."""
    spec = SPECS["float32"]
    inputs = on_device(make_inputs(spec, [70]))
    inputs.query[...] = 0
    inputs.query[..., 0] = 1e19
    inputs.key_cache[rows_of(inputs, 0, np.arange(70))] = -3e19
    inputs.key_cache[rows_of(inputs, 0, np.array([40]))] = 3e19
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs, scale=scale), scale=scale)


@every_spec
@pytest.mark.parametrize("scale", [None, 0.0])
def test_the_largest_values(cuda_decode, spec, scale):
    """An average of them is one of the numbers between them, in ranges that are joined too."""
    largest = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}
    inputs = on_device(make_inputs(spec, [0, 1, 2, 17, 300, 1000]))
    values = inputs.value_cache
    held = np.isfinite(values)
    values[held] = np.random.default_rng(0).choice([-1, 1, 1, 1], held.sum()) * largest[spec.dtype]
    if spec.dtype != spec.result_dtype == "bfloat16":
        values[held] *= 0.99
    out, lse = cuda_decode(spec).decode(inputs, scale=scale)
    assert np.isfinite(out.astype(np.float32)).all()
    assert_close_to_oracle(spec, inputs, out, lse, scale=scale)


@one_of_each_strategy
@pytest.mark.parametrize(("query", "key"), [(66, 63), (120, -100), (-30, 90), (100, 20), (-60, -15)])
def test_powers_of_two_go_from_queries_and_keys_to_the_scale(cuda_decode, spec, query, key):
    """So that products would overflow, or vanish, if the scale came after them: the same bits."""
    inputs = on_device(make_inputs(spec, [90, 1, 600]))
    moved = inputs.replace(query=inputs.query * inputs.query.dtype.type(2.0**query))
    moved = on_device(moved.replace(key_cache=inputs.key_cache * inputs.key_cache.dtype.type(2.0**key)))
    expected = cuda_decode(spec).decode(inputs, scale=-0.3)
    actual = cuda_decode(spec).decode(moved, scale=-0.3 * 2.0 ** -(query + key))
    for one, same in zip(actual, expected, strict=True):
        assert_same_bits(one, same)


@one_of_each_strategy
@pytest.mark.parametrize("scale", [0.0, 1e-38, -1e-38])
def test_products_beyond_the_scores(cuda_decode, spec, scale):
    inputs = on_device(make_inputs(spec, [1, 70, 600]))
    inputs.query[...] = 0
    inputs.query[..., 0] = 3e38
    inputs.key_cache[..., 0] *= 1e7 if scale else 1e38
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs, scale=scale), scale=scale)
