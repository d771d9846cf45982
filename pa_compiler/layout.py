"""How the caches lie in memory, and from one layout to another.

A cache holds element d of one head's key or value for the token in some slot of some block. Where, by kv_layout:

    NHD     [block, slot, head, d]
    HND     [block, head, slot, d]
    packed  keys [block, head, d // p, p * slot + d % p], values [block, head, slot // p, p * d + slot % p]

In the values d goes up to value_dim. p is 2 for bfloat16: pairs along the axis that a dot product sums over, d for
scores and tokens for outputs, since the instruction for it takes them in pairs. For float32 and float16 p is 1: packed
keys are transposed in their block, and packed values lie as in HND. Every kernel that reads or writes packed caches
relies on this. Of int4, whose p is 2, an array has bytes of two elements each: the one with the even place in the last
axis is in the lower half of its byte.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pa_compiler.kv_types import KV_TYPES
from pa_compiler.spec import DTYPES, KV_LAYOUTS, PagedAttentionSpec


def convert_cache(
    key_cache: Any, value_cache: Any, from_layout: str, to_layout: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Copy a pair of caches into another layout, bit for bit; there and back gives the same bytes.

    It is for loading and saving caches: it goes through memory with large strides.

    Args:
        key_cache: NumPy array in from_layout, float32, float16 or ml_dtypes.bfloat16, with any strides; or of codes,
            int8, ml_dtypes.float8_e4m3fn, float8_e5m2 or uint8 for int4, whose scales are the same in every layout.
        value_cache: NumPy array in from_layout, of the same dtype; its value_dim may be another than key_cache's
            head_dim. None for shared_kv, where key_cache alone is converted.
        from_layout: "NHD", "HND" or "packed".
        to_layout: The same; "packed" needs a block_size that is a multiple of 16, for bfloat16 an even head_dim, and a
            value_cache.

    Returns:
        key_cache and value_cache in to_layout: new contiguous arrays, even where the layouts are the same; None for
        a value_cache that is None.

    Raises:
        TypeError: an array is not a NumPy array of such a dtype.
        ValueError: an unknown layout, shapes that do not fit the layout or each other, or sizes that to_layout refuses.
    """
    for name, layout in (("from_layout", from_layout), ("to_layout", to_layout)):
        if layout not in KV_LAYOUTS:
            raise ValueError(f"{name}: expected one of {', '.join(KV_LAYOUTS)}, got {layout!r}")
        if value_cache is None and layout == "packed":
            raise ValueError("value_cache: expected an array for layout packed, which orders keys otherwise, got None")
    spec = _spec_of(key_cache, value_cache, from_layout)
    target = dataclasses.replace(spec, kv_layout=to_layout)
    # Where no layout of the two pairs elements, sizes need not be even.
    pair = spec.packed_pair if "packed" in (from_layout, to_layout) else 1
    converted: list[np.ndarray | None] = []
    for cache, shape, view in (
        (key_cache, target.key_cache_shape, _keys),
        (value_cache, target.value_cache_shape, _values),
    ):
        if cache is None:
            converted.append(None)
            continue
        new = np.empty((len(cache), *shape[1:]), cache.dtype)
        view(new, target, pair)[...] = view(_elements(cache), spec, pair)
        converted.append(new[..., 0::2] | new[..., 1::2] << np.uint8(4) if cache.dtype == np.uint8 else new)
    keys, values = converted
    assert keys is not None
    return keys, values


def _spec_of(key_cache: Any, value_cache: Any, layout: str) -> PagedAttentionSpec:
    """The spec of caches in a layout; how many query heads use them does not matter here.

    The shape of value_cache gives the sizes, and key_cache has to fit it. Without one, key_cache's gives them.
    """
    shared = value_cache is None
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if shared and name == "value_cache":
            continue
        if not isinstance(cache, np.ndarray):
            raise TypeError(f"{name}: expected a NumPy array, got {type(cache).__name__}")
        known = (*DTYPES, *(of for of in KV_TYPES if of != "int4"), "uint8")
        if cache.dtype.name not in known:
            raise TypeError(f"{name}: expected dtype {', '.join(known)}, got {cache.dtype}")
        if cache.ndim != 4 or 0 in cache.shape[1:]:
            raise ValueError(f"{name}: expected 4 axes of at least 1 element a block, got shape {list(cache.shape)}")
    values = key_cache if shared else value_cache
    if key_cache.dtype != values.dtype:
        raise TypeError(f"value_cache: expected key_cache's dtype, {key_cache.dtype}, got {values.dtype}")
    # a type that a spec may have, whose elements are in pairs where these are
    dtype = {"uint8": "bfloat16"}.get(key_cache.dtype.name, "float32")
    dtype = key_cache.dtype.name if key_cache.dtype.name in DTYPES else dtype
    key_shape, value_shape = ((*each.shape[:3], each.shape[3] * (1 + (each.dtype == np.uint8))) for each in (key_cache, values))
    pair = 2 if layout == "packed" and dtype == "bfloat16" else 1
    num_blocks, *extents = value_shape
    num_kv_heads, block_size, value_dim = (extents[i] for i in ((1, 0, 2) if layout == "NHD" else (0, 1, 2)))
    if value_dim % pair:
        raise ValueError(f"value_cache: expected a last axis of 2 * value_dim, got shape {list(values.shape)}")
    spec = PagedAttentionSpec(
        num_kv_heads,
        num_kv_heads,
        head_dim=pair * key_shape[2] if layout == "packed" else key_shape[3],
        block_size=pair * block_size,
        dtype=dtype,
        kv_layout=layout,
        value_dim=value_dim // pair,
        shared_kv=shared,
    )
    expected = [num_blocks, *spec.key_cache_shape[1:]]
    if list(key_shape) != expected:
        raise ValueError(
            f"key_cache: expected shape {expected} beside a value_cache of shape {list(values.shape)} in layout "
            f"{layout}, got {list(key_cache.shape)}"
        )
    return spec


def _elements(cache: np.ndarray) -> np.ndarray:
    """A cache with an element for each of its own: of bytes that hold two, both."""
    if cache.dtype != np.uint8:
        return cache
    return np.stack([cache & np.uint8(15), cache >> np.uint8(4)], axis=-1).reshape(*cache.shape[:3], 2 * cache.shape[3])


def _keys(cache: np.ndarray, spec: PagedAttentionSpec, p: int) -> np.ndarray:
    """A view [block, head, slot, d // p, d % p] of a key_cache: the same axes whatever the layout."""
    blocks, heads, slots, dims = len(cache), spec.num_kv_heads, spec.block_size, spec.head_dim // p
    if spec.kv_layout == "NHD":
        return cache.reshape(blocks, slots, heads, dims, p).swapaxes(1, 2)
    if spec.kv_layout == "HND":
        return cache.reshape(blocks, heads, slots, dims, p)
    return cache.reshape(blocks, heads, dims, slots, p).swapaxes(2, 3)


def _values(cache: np.ndarray, spec: PagedAttentionSpec, p: int) -> np.ndarray:
    """A view [block, head, slot // p, slot % p, d] of a value_cache: the same axes whatever the layout."""
    blocks, heads, slots, dims = len(cache), spec.num_kv_heads, spec.block_size // p, spec.result_dim
    if spec.kv_layout == "NHD":
        return cache.reshape(blocks, slots, p, heads, dims).transpose(0, 3, 1, 2, 4)
    if spec.kv_layout == "HND":
        return cache.reshape(blocks, heads, slots, p, dims)
    return cache.reshape(blocks, heads, slots, dims, p).swapaxes(3, 4)
