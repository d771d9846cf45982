"""How the caches lie in memory, and from one layout to another.

A cache holds element d of one head's key or value for the token in some slot of some block. Where, by kv_layout:

    NHD     [block, slot, head, d]
    HND     [block, head, slot, d]
    packed  keys [block, head, d // p, p * slot + d % p], values [block, head, slot // p, p * d + slot % p]

p is 2 for bfloat16: pairs along the axis that a dot product sums over, d for scores and tokens for outputs, since the
instruction for it takes them in pairs. For float32 and float16 p is 1: packed keys are transposed in their block, and
packed values lie as in HND. Every kernel that reads or writes packed caches relies on this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pa_compiler.spec import DTYPES, KV_LAYOUTS, PagedAttentionSpec


def convert_cache(key_cache: Any, value_cache: Any, from_layout: str, to_layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Copy a pair of caches into another layout, bit for bit; there and back gives the same bytes.

    It is for loading and saving caches: it goes through memory with large strides.

    Args:
        key_cache: NumPy array in from_layout, float32, float16 or ml_dtypes.bfloat16, with any strides.
        value_cache: NumPy array in from_layout, of the same dtype.
        from_layout: "NHD", "HND" or "packed".
        to_layout: The same; "packed" needs a block_size that is a multiple of 16 and, for bfloat16, an even head_dim.

    Returns:
        key_cache and value_cache in to_layout: new contiguous arrays, even where the layouts are the same.

    Raises:
        TypeError: an array is not a NumPy array of such a dtype.
        ValueError: an unknown layout, shapes that do not fit the layout or each other, or sizes that to_layout refuses.
    """
    for name, layout in (("from_layout", from_layout), ("to_layout", to_layout)):
        if layout not in KV_LAYOUTS:
            raise ValueError(f"{name}: expected one of {', '.join(KV_LAYOUTS)}, got {layout!r}")
    spec = _spec_of(key_cache, value_cache, from_layout)
    target = PagedAttentionSpec(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype, kv_layout=to_layout
    )
    # Where no layout of the two pairs elements, sizes need not be even.
    pair = spec.packed_pair if "packed" in (from_layout, to_layout) else 1
    converted = []
    for cache, shape, of in (
        (key_cache, target.key_cache_shape, "key"),
        (value_cache, target.value_cache_shape, "value"),
    ):
        new = np.empty((len(cache), *shape[1:]), cache.dtype)
        _elements(new, to_layout, of, spec, pair)[...] = _elements(cache, from_layout, of, spec, pair)
        converted.append(new)
    return converted[0], converted[1]


def _spec_of(key_cache: Any, value_cache: Any, layout: str) -> PagedAttentionSpec:
    """The spec of caches in a layout; how many query heads use them does not matter here.

    The shape of value_cache gives the sizes, and key_cache has to fit it.
    """
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not isinstance(cache, np.ndarray):
            raise TypeError(f"{name}: expected a NumPy array, got {type(cache).__name__}")
        if cache.dtype.name not in DTYPES:
            raise TypeError(f"{name}: expected dtype {', '.join(DTYPES)}, got {cache.dtype}")
        if cache.ndim != 4 or 0 in cache.shape[1:]:
            raise ValueError(f"{name}: expected 4 axes of at least 1 element a block, got shape {list(cache.shape)}")
    if key_cache.dtype != value_cache.dtype:
        raise TypeError(f"value_cache: expected key_cache's dtype, {key_cache.dtype}, got {value_cache.dtype}")
    dtype = value_cache.dtype.name
    num_blocks, *extents = value_cache.shape
    if layout == "NHD":
        block_size, num_kv_heads, head_dim = extents
    else:
        num_kv_heads, block_size, head_dim = extents
    if layout == "packed" and dtype == "bfloat16":
        if head_dim % 2:
            raise ValueError(f"value_cache: expected a last axis of 2 * head_dim, got shape {list(value_cache.shape)}")
        block_size, head_dim = 2 * block_size, head_dim // 2
    spec = PagedAttentionSpec(num_kv_heads, num_kv_heads, head_dim, block_size, dtype, kv_layout=layout)
    expected = [num_blocks, *spec.key_cache_shape[1:]]
    if list(key_cache.shape) != expected:
        raise ValueError(
            f"key_cache: expected shape {expected} beside a value_cache of shape {list(value_cache.shape)} in layout "
            f"{layout}, got {list(key_cache.shape)}"
        )
    return spec


def _elements(cache: np.ndarray, layout: str, of: str, spec: PagedAttentionSpec, p: int) -> np.ndarray:
    """A view [block, head, slot // p, slot % p, d // p, d % p] of a cache: the same axes whatever the layout."""
    blocks, heads, slots, dims = len(cache), spec.num_kv_heads, spec.block_size // p, spec.head_dim // p
    if layout == "NHD":
        return cache.reshape(blocks, slots, p, heads, dims, p).transpose(0, 3, 1, 2, 4, 5)
    if layout == "HND":
        return cache.reshape(blocks, heads, slots, p, dims, p)
    if of == "key":
        return cache.reshape(blocks, heads, dims, slots, p, p).transpose(0, 1, 3, 4, 2, 5)
    return cache.reshape(blocks, heads, slots, dims, p, p).transpose(0, 1, 2, 5, 3, 4)
