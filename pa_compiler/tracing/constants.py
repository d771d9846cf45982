"""Tensors of torch that a function closes over, as constants of the library, and the names of types."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy

from pa_compiler.score import CONSTANT_BYTES, Constant
from pa_compiler.tracing.operations import RefusedTypeError, RefusedValueError

_SAME = {
    **dict.fromkeys(("float32", "float64", "float", "double"), "float32"),
    **dict.fromkeys(("int32", "int64", "int", "long"), "int32"),
    "bool": "bool",
}
"""The type that is computed in, of those that functions name: double precision is taken as single."""


def dtype_named(dtype: object) -> str:
    """float32, int32 or bool, of a type of Python, NumPy or torch, or of its name."""
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


class Constants:
    """The constants of one call of a function, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Constant] = {}
        self._seen: dict[tuple[int, int], tuple[Any, Constant]] = {}  # the tensor too, so that no other has its id

    def named(self, names: set[str]) -> tuple[Constant, ...]:
        """Those of the names that are constants, sorted."""
        return tuple(self._by_name[name] for name in sorted(names & self._by_name.keys()))

    def add(self, tensor: Any) -> Constant:
        """A tensor of torch as a constant: int64 as int32 where its numbers fit, float64 rounded to float32."""
        key = (id(tensor), tensor._version)
        if key not in self._seen:
            constant = _constant(tensor)
            self._by_name[constant.name] = constant
            self._seen[key] = tensor, constant
            size = sum(len(each.data) for each in self._by_name.values())
            if size > CONSTANT_BYTES:
                raise RefusedValueError(_too_large(size))
        return self._seen[key][1]


def _too_large(size: int) -> str:
    return (
        f"expected at most {CONSTANT_BYTES} bytes of tensors that a function closes over, got {size}: "
        "larger ones are given at each call, as `inputs`"
    )


def _constant(tensor: Any) -> Constant:
    torch = sys.modules["torch"]
    if tensor.numel() * 4 > 16 * CONSTANT_BYTES:
        raise RefusedValueError(_too_large(tensor.numel() * tensor.element_size()))
    if tensor.numel() == 0:
        raise RefusedValueError(f"an index into a tensor without elements, of shape {tuple(tensor.shape)}")
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float64:
        tensor = tensor.to(torch.float32)
    elif tensor.dtype in (torch.int64, torch.int16, torch.int8, torch.uint8):
        low, high = int(tensor.min()), int(tensor.max())
        if not -(1 << 31) <= low <= high < 1 << 31:
            raise RefusedValueError(f"expected a tensor whose numbers int32 holds, got {low} to {high}")
        tensor = tensor.to(torch.int32)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float16", "bfloat16", "int32", "bool"):
        raise RefusedTypeError(f"a tensor of {dtype}: expected float32, float16, bfloat16, int32 or bool")
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = tuple(int(extent) for extent in tensor.shape)
    digest = hashlib.sha256(f"{dtype} {shape} ".encode() + data).hexdigest()
    return Constant(f"table_{digest[:16]}", dtype, shape, data)
