"""What a caller hands over, brought to the library: arrays as DLPack, and whole numbers checked.

The library checks arrays itself, so here they are looked at only once it has refused them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tvm_ffi

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}
"""By their names in a spec."""

_BFLOAT16, _UINT16 = NUMPY_DTYPES["bfloat16"], np.dtype(np.uint16)


def check_whole(name: str, value: object, least: int) -> None:
    """Check that an argument is an int (and no bool) of at least `least`.

    Raises:
        TypeError, ValueError: it is not; the argument is named.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def expected_arrays(**dtypes: str) -> list[tuple[str, np.dtype]]:
    """The arrays of a call in order, each with its name and NumPy's dtype of its elements."""
    return [(name, NUMPY_DTYPES[dtype]) for name, dtype in dtypes.items()]


def call(
    function: Callable[..., None],
    expected: Sequence[tuple[str, np.dtype]],
    arrays: Sequence[Any],
    written: Sequence[str],
    *numbers: float,
) -> None:
    """Call the library with arrays and numbers; an array that cannot be handed over is named.

    The library checks everything itself. What it cannot be told is looked for only once it has refused the arrays.
    """
    arguments, as_uint16 = _without_bfloat16(expected, arrays)
    try:
        function(*arguments, *numbers, as_uint16)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        _check_kinds(expected, arrays)
        tensors = [
            None if argument is None else as_tensor(name, argument, written=name in written)
            for (name, _), argument in zip(expected, arguments, strict=True)
        ]
        if not isinstance(error, BufferError):
            raise
        function(*tensors, *numbers, as_uint16)  # NumPy's read-only arrays need more words


def _without_bfloat16(expected: Sequence[tuple[str, np.dtype]], arrays: Sequence[Any]) -> tuple[list[Any], int]:
    """Arrays as the library takes them, the same memory, and a call's as_uint16.

    NumPy has no bfloat16 in DLPack: such an array is handed over as uint16, and its bit in as_uint16 set.
    """
    arguments, as_uint16 = list(arrays), 0
    for position, (_, dtype) in enumerate(expected):
        if dtype is _BFLOAT16:
            array = arrays[position]
            if isinstance(array, np.ndarray) and (array.dtype is dtype or array.dtype == dtype):
                arguments[position] = array.getfield(_UINT16)  # a view, in half of view's time
                as_uint16 |= 1 << position
    return arguments, as_uint16


def _check_kinds(expected: Sequence[tuple[str, np.dtype]], arrays: Sequence[Any]) -> None:
    """Check that arrays are arrays, and the dtypes of NumPy's, which need not be ones that DLPack has."""
    for array, (name, dtype) in zip(arrays, expected, strict=True):
        if isinstance(array, np.ndarray):
            if array.dtype != dtype:
                raise TypeError(f"{name}: expected dtype {dtype}, got {array.dtype}")
        elif not hasattr(array, "__dlpack__") and (array is not None or name != "lse"):
            raise TypeError(f"{name}: expected an array with DLPack, got {type(array).__name__}")


def as_tensor(name: str, array: Any, *, written: bool = False) -> tvm_ffi.Tensor:
    """An array as a tensor: the same memory."""
    if isinstance(array, np.ndarray):
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(
                f"{name}: expected strides in multiples of its {array.itemsize}-byte elements, got {array.strides}"
            )
        if not array.flags.writeable:
            if written:
                raise ValueError(f"{name}: expected a writable array, got a read-only one")
            array = np.asarray(_Writable(array))
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name}: expected an array with DLPack, got {type(array).__name__}")
    try:
        return tvm_ffi.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array with DLPack, got one that refuses: {error}") from error


class _Writable:
    """A read-only NumPy array's memory, declared writable: DLPack before 1.0 cannot say that an array is read-only."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
