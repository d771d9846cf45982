"""What a caller hands over beside arrays: numbers, checked. And the dtypes of arrays in NumPy."""

from __future__ import annotations

import numbers
import reprlib
from typing import Any

import ml_dtypes
import numpy as np

from pa_compiler.runtime import dlpack, torch_tensors

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}
"""By their names in a spec."""


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`: an int or one of NumPy's integers, and no bool.

    Raises:
        TypeError, ValueError: it is none; the argument is named.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {shown(value)} of type {type(value).__name__}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {shown(number)}")
    if most is not None and number > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(number)}")
    return number


def real_number(name: str, value: object) -> float:
    """A real number as a float, of Python, NumPy, or an array of no axes on the CPU; no bool. It may not be finite.

    Raises:
        TypeError, ValueError: it is none, or too large for a float; the argument is named.
    """
    if type(value) is float:
        return value
    number = value if isinstance(value, numbers.Real) else _item(name, value)
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise TypeError(f"{name}: expected a number, got {shown(number)} of type {type(value).__name__}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite float32, got {shown(number)}") from None


def _item(name: str, array: object) -> object:
    """The number in an array of no axes. Anything else is returned as it is."""
    if getattr(array, "shape", None) != () or not hasattr(array, "item"):
        return array
    if torch_tensors.is_tensor(array):
        torch_tensors.check(name, array)
    if hasattr(array, "__dlpack_device__"):
        device = array.__dlpack_device__()[0]
        if device != dlpack.CPU:
            raise ValueError(f"{name}: expected a number or an array on the CPU, got one on device type {int(device)}")
    return array.item()


def shown(value: Any) -> str:
    """A value in words of bounded length, for which an array's contents are not read."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"{'a negative' if value < 0 else 'an'} int of {value.bit_length()} bits"  # too long ones have no digits
    if hasattr(value, "shape") and not isinstance(value, np.generic):
        return f"an array of shape {list(value.shape)}"
    return reprlib.repr(value)
