"""convert_cache: every layout into every other, bit for bit, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from inputs import DTYPES, lay_out, make_inputs
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec, convert_cache, reference

LAYOUTS = ("NHD", "HND", "packed")
SIZES = [(1, 2, 16, 2), (5, 80, 16, 96), (2, 6, 48, 5), (1, 128, 128, 128)]
"""num_kv_heads, head_dim, block_size, value_dim"""


def caches(layout, dtype, sizes, num_blocks=3):
    """Caches in which every bit pattern that fits occurs, NaNs with their payloads, the other layouts' alike."""
    heads, head_dim, block_size, value_dim = sizes
    spec = PagedAttentionSpec(heads, heads, head_dim, block_size, dtype, kv_layout=layout, value_dim=value_dim)
    rng = np.random.default_rng(0)
    shapes = [(num_blocks, block_size, heads, dim) for dim in (head_dim, value_dim)]
    noises = [rng.bytes(int(np.prod(shape)) * DTYPES[dtype].itemsize) for shape in shapes]
    return lay_out(spec, *map(np.ndarray, shapes, [DTYPES[dtype]] * 2, noises))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("one", "other"), list(itertools.product(LAYOUTS, repeat=2)))
def test_every_layout_into_every_other(one, other, dtype, sizes):
    given, expected = caches(one, dtype, sizes), caches(other, dtype, sizes)
    converted = convert_cache(*given, one, other)
    for before, after, wanted in zip(given, converted, expected, strict=True):
        assert_same_bits(after, wanted)
        assert after.flags.c_contiguous
        assert after.flags.writeable
        assert not np.shares_memory(before, after)
    for before, after in zip(given, convert_cache(*converted, other, one), strict=True):
        assert_same_bits(after, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_cannot_be_packed(dtype):
    """Between NHD and HND no size has to be even."""
    given = caches("NHD", dtype, (3, 7, 5, 9))
    for cache, converted in zip(given, convert_cache(*given, "NHD", "HND"), strict=True):
        assert_same_bits(converted, cache.swapaxes(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_that_is_shared_is_converted_alone(dtype):
    key, _ = caches("NHD", dtype, (3, 7, 5, 7))
    converted, none = convert_cache(key, None, "NHD", "HND")
    assert none is None
    assert_same_bits(converted, key.swapaxes(1, 2))
    assert_same_bits(convert_cache(converted, None, "HND", "NHD")[0], key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout):
    """Both caches in one buffer, blocks in reverse, and no blocks at all."""
    key, value = caches(layout, "bfloat16", (2, 6, 16, 6), num_blocks=4)
    both = np.stack([key.reshape(4, -1), value.reshape(4, -1)], axis=1)[::-1]
    views = both[:, 0].reshape(key.shape), both[:, 1].reshape(value.shape)
    expected = convert_cache(key, value, layout, "HND")
    for converted, wanted in zip(convert_cache(*views, layout, "HND"), expected, strict=True):
        assert_same_bits(converted, wanted[::-1])
    empty = convert_cache(key[:0], value[:0], layout, "packed")
    assert [cache.shape for cache in empty] == [(0, 2, 3, 32), (0, 2, 8, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_same_in_every_layout(dtype):
    spec = PagedAttentionSpec(4, 2, 6, 16, dtype)
    inputs = make_inputs(spec, [0, 1, 16, 37])
    expected = reference.decode(*inputs.arguments)
    for layout in LAYOUTS:
        key_cache, value_cache = convert_cache(inputs.key_cache, inputs.value_cache, "NHD", layout)
        moved = inputs.replace(key_cache=key_cache, value_cache=value_cache)
        assert_same_bits(reference.decode(*moved.arguments, kv_layout=layout), expected)


KEY, VALUE = (np.zeros((2, 16, 3, 6), DTYPES["bfloat16"]) for _ in range(2))

REFUSED = [  # id, error, the argument and what its message also shows, the call
    ("from", ValueError, r"from_layout\b.*packed.*'NDH'", (KEY, VALUE, "NDH", "NHD")),
    ("to", ValueError, r"to_layout\b.*packed.*None", (KEY, VALUE, "NHD", None)),
    ("list", TypeError, r"key_cache\b.*list", (KEY.tolist(), VALUE, "NHD", "HND")),
    ("float64", TypeError, r"value_cache\b.*bfloat16.*float64", (KEY, VALUE.astype(np.float64), "NHD", "HND")),
    ("dtypes", TypeError, r"value_cache\b.*bfloat16.*float16", (KEY, VALUE.astype(np.float16), "NHD", "HND")),
    ("rank", ValueError, r"value_cache\b.*4 axes.*\[16, 3, 6\]", (KEY, VALUE[0], "NHD", "HND")),
    ("shared", ValueError, r"value_cache\b.*packed.*None", (KEY, None, "NHD", "packed")),
    ("shared_list", TypeError, r"key_cache\b.*list", (KEY.tolist(), None, "NHD", "HND")),
    ("blocks", ValueError, r"key_cache\b.*\[2, 16, 3, 6\].*\[1, 16, 3, 6\]", (KEY[:1], VALUE, "NHD", "HND")),
    ("slots", ValueError, r"key_cache\b.*\[2, 16, 3, 6\].*\[2, 8, 3, 6\]", (KEY[:, :8], VALUE, "NHD", "HND")),
    ("no_heads", ValueError, r"key_cache\b.*\[2, 16, 0, 6\]", (KEY[:, :, :0], VALUE[:, :, :0], "NHD", "HND")),
    ("block_size", ValueError, r"block_size\b.*16.*packed.*8", (KEY[:, :8], VALUE[:, :8], "NHD", "packed")),
    ("head_dim", ValueError, r"head_dim\b.*even.*packed.*5", (KEY[..., :5], VALUE[..., :5], "NHD", "packed")),
    ("not_packed", ValueError, r"block_size\b.*16.*packed.*6", (KEY, VALUE, "packed", "NHD")),
    ("odd_pairs", ValueError, r"value_cache\b.*value_dim.*\[2, 16, 3, 5\]", (KEY, VALUE[..., :5], "packed", "NHD")),
]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(("error", "says", "call"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(figure, error, says, call):
    with pytest.raises(error, match=f"^{says}"):
        convert_cache(*call)
    figure("kinds", 1)


@pytest.mark.parametrize(
    ("held", "words", "message"),
    [
        ("float32", {"key_scale": np.ones(1)}, "key_scale: expected None without dtype, got ndarray"),
        ("int8", {"value_scale": np.ones(1)}, "value_scale: expected None without dtype, got ndarray"),
        ("int8", {"kv_rotation": "none"}, "kv_rotation: expected None without dtype, got 'none'"),
        (
            "float32",
            {"dtype": "int8", "key_scale": np.ones(1)},
            "key_scale: expected None .* of int8, whose",
        ),
        ("float32", {"dtype": "float16", "key_scale": np.ones(1)}, "key_scale: expected None .* of float16, which has"),
        ("float32", {"dtype": "float16", "kv_rotation": "none"}, "kv_rotation: expected None where neither cache is"),
    ],
)
def test_what_a_conversion_would_do_nothing_with_is_refused(held, words, message):
    cache = np.zeros((1, 16, 2, 8), held)
    with pytest.raises(ValueError, match=rf"^{message}"):
        convert_cache(cache, cache, "NHD", "HND", **words)
