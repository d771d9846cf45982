"""Caches of codes in NumPy: what append_kv has to make of keys and values, and codes and scales for calls.

The codes are those of pa_compiler/codes.py, which shares no code with the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pa_compiler.codes import CODE_DTYPES, Codes, hadamard, in_bytes, quantised
from pa_compiler.kv_types import LARGEST
from pa_compiler.spec import PagedAttentionSpec

__all__ = [
    "CODE_DTYPES",
    "Codes",
    "coded",
    "hadamard",
    "in_bytes",
    "poison_codes",
    "quantised",
    "random_codes",
    "scale_arrays",
]

GARBAGE_SCALES = np.array([np.nan, np.inf, -np.inf, 3e38, 0.0, -1.0], np.float32)
"""What scales of slots hold that no token is in: some of them spoil whatever they multiply."""


def random_codes(
    rng: np.random.Generator, cache: np.ndarray, half: float, advance: Callable[[int], object] = lambda elements: None
) -> np.ndarray:
    """Fill a cache with codes that times 1 / LARGEST of int8, or 1 of float8, are numbers uniform in [-half, half)."""
    flat, piece = cache.reshape(-1), 1 << 22
    if cache.dtype == np.uint8:  # two codes each
        for start in range(0, flat.size, piece):
            part = flat[start : start + piece]
            part[:] = rng.integers(0, 256, part.size, np.uint8)
            advance(part.size)
        return cache
    of = LARGEST["int8"] * half if cache.dtype == np.int8 else half
    for start in range(0, flat.size, piece):
        part = flat[start : start + piece]
        numbers = (rng.random(part.size, dtype=np.float32) - np.float32(0.5)) * np.float32(2 * of)
        part[:] = np.rint(numbers) if cache.dtype == np.int8 else numbers
        advance(part.size)
    return cache


def scale_arrays(rng: np.random.Generator, spec: PagedAttentionSpec, num_blocks: int) -> dict[str, np.ndarray]:
    """key_scale and value_scale of a spec with a kv_dtype, by keyword: from 0.5 to 1, and of int8 a 127th of that.

    Of int4 a 15th, with zero points that lay its codes around 0.
    """
    if not spec.has_scales:
        return {}
    shape = [num_blocks if isinstance(extent, str) else extent for extent in spec.scale_shape]
    if spec.has_zeros:
        scales = [((1 + rng.random(shape[:-1])) / (2 * LARGEST["int4"])).astype(np.float32) for _ in range(2)]
        both = [np.stack([scale, scale * np.float32(-7.5)], axis=-1) for scale in scales]
        return dict(zip(("key_scale", "value_scale"), both, strict=True))
    unit = LARGEST["int8"] if spec.kv_dtype == "int8" else 1.0
    return {name: ((1 + rng.random(shape)) / (2 * unit)).astype(np.float32) for name in ("key_scale", "value_scale")}


def poison_codes(rng: np.random.Generator, cache: np.ndarray) -> None:
    """Fill a cache with bytes that spoil any sum: NaN and infinities of float8, and -128 of int8.

    append_kv writes no such code. int4 has none, but scales and zero points that do.
    """
    if cache.dtype == np.uint8:
        cache[...] = rng.integers(0, 256, cache.shape, np.uint8)
        return
    bytes_of = {"int8": [0x80], "float8_e4m3fn": [0x7F, 0xFF], "float8_e5m2": [0x7C, 0xFC, 0x7D, 0x7F, 0xFE, 0xFF]}
    cache.view(np.uint8)[...] = rng.choice(np.array(bytes_of[cache.dtype.name], np.uint8), cache.shape)


class Coded(NamedTuple):
    """The caches of a call as codes, in NHD, with the numbers that append_kv is given for them.

    Attributes:
        keys, values: The codes; poison in slots that hold no token that is seen.
        scales: key_scale and value_scale by keyword, in which those of such slots are garbage.
        new_keys, new_values: [num_blocks, block_size, num_kv_heads, dim], dtype.
    """

    keys: np.ndarray
    values: np.ndarray
    scales: dict[str, np.ndarray]
    new_keys: np.ndarray
    new_values: np.ndarray


def coded(
    rng: np.random.Generator, spec: PagedAttentionSpec, keys: np.ndarray, values: np.ndarray, is_used: np.ndarray
) -> Coded:
    """Drawn keys and values as codes. A scale of float8 lets some numbers be beyond the largest, or none."""
    assert spec.kv_dtype is not None
    caches, scales = [], {}
    for name, numbers in (("key_scale", keys), ("value_scale", values)):
        given = None
        if not spec.token_scales:
            magnitudes = np.abs(numbers[is_used].astype(np.float32))
            largest = magnitudes[np.isfinite(magnitudes)].max(initial=0) or 1.0
            shape = (spec.num_kv_heads,) if spec.scales_of == "head" else (1,)
            given = (largest / LARGEST[spec.kv_dtype] * rng.uniform(0.5, 2, shape)).astype(np.float32)
        of_scale = None if given is None else given[:, None]
        codes, scale = quantised(numbers, spec.kv_dtype, of_scale, rotates=spec.rotates)
        poison = np.empty_like(codes)
        poison_codes(rng, poison)
        caches.append(np.where(is_used[..., None, None], codes.view(np.uint8), poison.view(np.uint8)).view(codes.dtype))
        if given is None:
            garbage = rng.choice(GARBAGE_SCALES, scale.shape)
            of_slots = np.expand_dims(is_used, tuple(range(2, scale.ndim)))
            given = np.ascontiguousarray(np.where(of_slots, scale, garbage).swapaxes(1, 2))
        scales[name] = given
    return Coded(caches[0], caches[1], scales, keys, values)
