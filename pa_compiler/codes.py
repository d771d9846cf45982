"""Caches of codes in NumPy: numbers as codes, as append_kv makes them, and codes as numbers.

It shares no code with the kernels: int8 and int4 are rounded by np.rint, float8 by ml_dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from pa_compiler.kv_types import LARGEST

CODE_DTYPES = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int4": np.dtype(np.uint8),
}
"""The types of codes, or of the bytes that hold two, by their names in a spec."""


class Codes(NamedTuple):
    """Codes, and what each of them counts.

    Attributes:
        codes: Of the numbers' shape; of int4 its last axis has half of that, in bytes.
        scale: float32, of that shape without its last axis where each row has a scale, and of int4 with one of 2: the
            scale and the zero point; otherwise as it was given.
    """

    codes: np.ndarray
    scale: np.ndarray


def quantised(numbers: np.ndarray, kv_dtype: str, scale: np.ndarray | None = None, *, rotates: bool = False) -> Codes:
    """The codes nearest to numbers / scale, ties to even, and beyond the largest number of the type that one.

    Args:
        numbers: [..., dim], any floating dtype.
        kv_dtype: The type of the codes.
        scale: For float8, float32, that broadcasts to numbers. int8 has max |number| / 127 for each row, int4
            (max - min) / 15, with min for the zero point.
        rotates: Whether each row is multiplied by H / sqrt(dim) first: by H, and its scale by 1 / sqrt(dim) then.
    """
    numbers, largest = numbers.astype(np.float32), np.float32(LARGEST[kv_dtype])
    factor = np.float32(1)
    with np.errstate(all="ignore"):
        if rotates:
            numbers, factor = hadamard(numbers), np.float32(1 / np.sqrt(numbers.shape[-1]))
        if kv_dtype == "int4":
            return _nibbles(numbers, largest, factor)
        if kv_dtype == "int8":
            scales = (np.abs(numbers).max(axis=-1, initial=0) / largest).astype(np.float32)
            nearest = np.rint(np.clip(numbers / scales[..., None], -largest, largest))
            is_ordinary = (scales > 0) & (scales < np.inf)
            return Codes(np.where(is_ordinary[..., None], nearest, 0).astype(np.int8), scales * factor)
        assert scale is not None
        quotient = (numbers / scale).astype(np.float32)
        held = np.where(np.isnan(quotient), quotient, np.clip(quotient, -largest, largest))
        return Codes(held.astype(CODE_DTYPES[kv_dtype]), scale)


def _nibbles(numbers: np.ndarray, largest: np.float32, factor: np.float32) -> Codes:
    least = numbers.min(axis=-1)
    scales = ((numbers.max(axis=-1) - least) / largest).astype(np.float32)
    nearest = np.rint(np.clip((numbers - least[..., None]) / scales[..., None], 0, largest))
    is_ordinary = (scales > 0) & (scales < np.inf)
    codes = np.where(is_ordinary[..., None], nearest, 0).astype(np.uint8)
    zeros = np.where(np.isfinite(scales), least, scales)
    return Codes(in_bytes(codes), np.stack([scales * factor, zeros * factor], axis=-1))


def hadamard(numbers: np.ndarray) -> np.ndarray:
    """numbers [..., dim] times Sylvester's matrix of 1 and -1: sums and differences, of neighbours first."""
    dim, apart = numbers.shape[-1], 1
    while apart < dim:
        pairs = numbers.reshape(*numbers.shape[:-1], dim // (2 * apart), 2, apart)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        numbers = np.stack([first + second, first - second], axis=-2).reshape(numbers.shape)
        apart *= 2
    return numbers


def in_bytes(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits [..., n] as bytes [..., n / 2], of two the first in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def elements(codes: np.ndarray) -> np.ndarray:
    """Codes with an element for each of their own: of bytes [..., n] that hold two, [..., 2 * n]."""
    if codes.dtype != np.uint8:
        return codes
    return np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1).reshape(
        *codes.shape[:-1], 2 * codes.shape[-1]
    )


def numbers(codes: np.ndarray, scale: np.ndarray, *, rotates: bool = False) -> np.ndarray:
    """What codes [..., dim] count, float32: one multiplication and one addition of each element, rounded once.

    Args:
        codes: As quantised() has them.
        scale: Of each row, with a last axis of 2 for int4, where the second is the zero point; or what broadcasts to
            the codes.
        rotates: Whether the rows were multiplied by H / sqrt(dim), which is taken back.
    """
    found = elements(codes).astype(np.float64)
    with np.errstate(all="ignore"):
        if codes.dtype == np.uint8:
            found = found * scale[..., :1] + scale[..., 1:].astype(np.float64)
        else:
            found = found * (scale[..., None] if scale.ndim == codes.ndim - 1 else scale)
        if rotates:
            found = hadamard(found) / np.sqrt(found.shape[-1])
        return found.astype(np.float32)
