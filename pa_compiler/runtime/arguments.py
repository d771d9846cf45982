"""What a caller hands over beside arrays: numbers, checked. And the dtypes of arrays in NumPy."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pa_compiler.runtime import dlpack, torch_tensors
from pa_compiler.spec import PagedAttentionSpec

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "uint8": np.dtype(np.uint8),
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


def block_tables(given: tuple[Any, ...] | None) -> tuple[None, Any, Any]:
    """A block_table that is a pair (indptr, indices) as libraries take it, which have a table before these.

    Raises:
        TypeError: it is None or a tuple of another length, or None is among it.
    """
    if given is None or len(given) != 2:
        got = "NoneType" if given is None else f"a tuple of {len(given)}"
        raise TypeError(f"block_table: expected an array with DLPack or a pair (indptr, indices), got {got}")
    for number, array in enumerate(given):
        if array is None:
            raise TypeError(f"block_table[{number}]: expected an array with DLPack, got NoneType")
    return (None, *given)


def input_arrays(spec: PagedAttentionSpec, given: object) -> tuple[Any, ...]:
    """The arrays of a mapping by the names of a spec's inputs, in the spec's order. None stands for no inputs.

    Raises:
        TypeError: it is no mapping, or has other names.
    """
    names = [each.name for each in spec.inputs]
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise TypeError(f"inputs: expected a mapping of arrays by their names, got {shown(given)}")
    if given.keys() != set(names):
        raise TypeError(f"inputs: expected {_arrays_named(names)}, got {', '.join(map(str, given)) or 'none'}")
    return tuple(given[name] for name in names)


def _arrays_named(names: Sequence[str]) -> str:
    return f"arrays named {', '.join(names)}" if names else "none, since the spec has no inputs"


def shown(value: Any) -> str:
    """A value in words of bounded length, for which an array's contents are not read."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"{'a negative' if value < 0 else 'an'} int of {value.bit_length()} bits"  # too long ones have no digits
    if hasattr(value, "shape") and not isinstance(value, np.generic):
        return f"an array of shape {list(value.shape)}"
    return reprlib.repr(value)
