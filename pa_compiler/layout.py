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

import ml_dtypes
import numpy as np

from pa_compiler import codes
from pa_compiler.kv_types import KV_ROTATIONS, KV_TYPES
from pa_compiler.spec import DTYPES, KV_LAYOUTS, PagedAttentionSpec

NUMPY_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def convert_cache(
    key_cache: Any,
    value_cache: Any,
    from_layout: str,
    to_layout: str,
    *,
    dtype: str | None = None,
    key_scale: np.ndarray | None = None,
    value_scale: np.ndarray | None = None,
    kv_rotation: str | None = None,
) -> tuple[Any, ...]:
    """Copy a pair of caches into another layout, bit for bit; there and back gives the same bytes. Or to another type.

    It is for loading and saving caches: it goes through memory with large strides.

    Args:
        key_cache: NumPy array in from_layout, float32, float16 or ml_dtypes.bfloat16, with any strides; or of codes,
            int8, ml_dtypes.float8_e4m3fn, float8_e5m2 or uint8 for int4, whose scales are the same in every layout.
        value_cache: NumPy array in from_layout, of the same dtype; its value_dim may be another than key_cache's
            head_dim. None for shared_kv, where key_cache alone is converted, and to no other type.
        from_layout: "NHD", "HND" or "packed".
        to_layout: The same; "packed" needs a block_size that is a multiple of 16, for bfloat16 an even head_dim, and a
            value_cache.
        dtype: Type of the new caches: of a spec's dtype, or of its kv_dtype. None leaves the type, and the bits.
        key_scale: Where dtype is given, what elements of key_cache count if it holds codes; what those of the new one
            are to count if these are float8, else 1. Shapes are those of decode.
        value_scale: The same of value_cache.
        kv_rotation: Of the codes that there are, or that are made: "hadamard" or "none", or None for what a spec has.

    Returns:
        key_cache and value_cache in to_layout: new contiguous arrays, even where the layouts are the same; None for
        a value_cache that is None. Where codes are made, key_scale and value_scale after these. From codes to codes
        rotation and scales are those of the old ones; the new ones are made with 1, or rotated as a spec has it.

    Raises:
        TypeError: an array is not a NumPy array of such a dtype.
        ValueError: an unknown layout or type, shapes that do not fit the layout or each other, sizes that to_layout or
            a rotation refuses, scales of codes that are not given, or scales or a rotation that nothing asks for.
    """
    if dtype is not None:
        return _converted_type(
            (key_cache, value_cache), (from_layout, to_layout), dtype, (key_scale, value_scale), kv_rotation
        )
    _check_none({"key_scale": key_scale, "value_scale": value_scale, "kv_rotation": kv_rotation}, "without dtype")
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
        view(new, target, pair)[...] = view(codes.elements(cache), spec, pair)
        converted.append(codes.in_bytes(new) if cache.dtype == np.uint8 else new)
    keys, values = converted
    assert keys is not None
    return keys, values


def _check_none(given: dict[str, Any], why: str) -> None:
    """Refuse arguments that nothing would be done with."""
    for name, value in given.items():
        if value is not None:
            got = repr(value) if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{name}: expected None {why}, got {got}")


def _converted_type(
    caches: tuple[Any, Any], layouts: tuple[str, str], dtype: str, scales: tuple[Any, Any], kv_rotation: str | None
) -> tuple[Any, ...]:
    """convert_cache to another type, by way of NHD and float32."""
    if dtype not in (*DTYPES, *KV_TYPES):
        raise ValueError(f"dtype: expected one of {', '.join((*DTYPES, *KV_TYPES))}, got {dtype!r}")
    if kv_rotation not in (None, *KV_ROTATIONS):
        raise ValueError(f"kv_rotation: expected one of {', '.join(KV_ROTATIONS)}, got {kv_rotation!r}")
    if caches[1] is None:
        raise ValueError("value_cache: expected an array for another dtype, got None")
    in_order = convert_cache(*caches, layouts[0], "NHD")
    held = {np.dtype(of).name: name for name, of in codes.CODE_DTYPES.items()}.get(in_order[0].dtype.name)
    if held is None and dtype not in KV_TYPES:
        _check_none({"kv_rotation": kv_rotation}, "where neither cache is of codes")
    if held is None and (dtype not in KV_TYPES or "token_head" in KV_TYPES[dtype]):
        why = "whose scales are made" if dtype in KV_TYPES else "which has none"
        _check_none({"key_scale": scales[0], "value_scale": scales[1]}, f"for a new cache of {dtype}, {why}")
    found, made = [], []
    for name, cache, scale in zip(("key", "value"), in_order, scales, strict=True):
        numbers = cache
        if held is not None:
            if scale is None:
                raise ValueError(f"{name}_scale: expected an array beside a {name}_cache of {held}, got None")
            numbers = codes.numbers(cache, _by_row(scale), rotates=_rotates(held, kv_rotation))
            scale = None
        if dtype in DTYPES:
            found.append(numbers.astype(NUMPY_FLOATS[dtype]))
            continue
        rotation = kv_rotation if held is None else None
        if _rotates(dtype, rotation) and numbers.shape[-1] & (numbers.shape[-1] - 1):
            raise ValueError(f"{name}_cache: expected a power of two to rotate, got {numbers.shape[-1]} elements")
        given = None if "token_head" in KV_TYPES[dtype] else np.ones(1, np.float32) if scale is None else scale
        new = codes.quantised(
            numbers, dtype, None if given is None else _by_row(given), rotates=_rotates(dtype, rotation)
        )
        found.append(new.codes)
        made.append(given if given is not None else np.ascontiguousarray(new.scale.swapaxes(1, 2)))
    new_keys, new_values = found
    return (*convert_cache(new_keys, new_values, "NHD", layouts[1]), *made)


def _rotates(kv_dtype: str, kv_rotation: str | None) -> bool:
    """CachesOfCodes.rotates."""
    return kv_rotation == "hadamard" or (kv_rotation is None and kv_dtype == "int4")


def _by_row(scale: np.ndarray) -> np.ndarray:
    """Scales as decode takes them, for caches in NHD: of tokens [block, slot, head], of heads and caches [head, 1]."""
    return scale.swapaxes(1, 2) if scale.ndim >= 3 else scale[:, None]


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
    key_shape, value_shape = (
        (*each.shape[:3], each.shape[3] * (1 + (each.dtype == np.uint8))) for each in (key_cache, values)
    )
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
