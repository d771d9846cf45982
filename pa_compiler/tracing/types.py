"""The types that functions name in casts."""

from __future__ import annotations

from typing import NoReturn

import numpy

from pa_compiler.tracing.operations import RefusedTypeError

_SAME = {
    **dict.fromkeys(("float32", "float64", "float", "double"), "float32"),
    **dict.fromkeys(("int32", "int64", "int", "long"), "int32"),
    "bool": "bool",
}
"""The type that is computed in, of those that functions name: double precision is taken as single."""


class ValueType:
    """The type of a value, for casts. It is compared with nothing: the reference computes in larger types."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> NoReturn:
        raise RefusedTypeError("a .dtype compared: it is for casts, as in x.to(score.dtype)")

    __hash__ = None  # type: ignore[assignment]


def dtype_named(dtype: object) -> str:
    """float32, int32 or bool, of a type of Python, NumPy, torch or a stand-in, or of its name."""
    if isinstance(dtype, ValueType):
        return dtype.name
    if isinstance(dtype, type):
        name = dtype.__name__
    elif isinstance(dtype, numpy.dtype):
        name = dtype.name
    else:
        name = str(dtype).removeprefix("torch.")
    name = name.rstrip("_")  # numpy.bool_ of NumPy 1
    if name not in _SAME:
        raise RefusedTypeError(f"a cast to {name}: only to float32, int32 and bool, or float64 and int64 as those")
    return _SAME[name]
