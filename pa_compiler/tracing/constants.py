"""Tensors of torch that a function closes over, as constants of the library."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from pa_compiler.score import CONSTANT_BYTES, INPUT_DTYPES, Constant
from pa_compiler.tracing.operations import RefusedTypeError, RefusedValueError

_KEPT = {
    **{name: name for name in INPUT_DTYPES},
    "float64": "float32",
    **dict.fromkeys(("int64", "int16", "int8", "uint8"), "int32"),
}
"""Types of tensors, and as what their elements are in a library."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "bool": 1}


class Constants:
    """The constants of one call of a function, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Constant] = {}

    def named(self, names: set[str]) -> tuple[Constant, ...]:
        """Those of the names that are constants, sorted."""
        return tuple(self._by_name[name] for name in sorted(names & self._by_name.keys()))

    def add(self, tensor: Any) -> Constant:
        """A tensor of torch as a constant: int64 as int32 where its numbers fit, float64 rounded to float32."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        kept = _KEPT.get(dtype)
        if kept is None:
            raise RefusedTypeError(f"a tensor of {dtype}: expected one of {', '.join(_KEPT)}")
        if not tensor.numel():
            raise RefusedValueError(f"expected a tensor with elements, got one of shape {tuple(tensor.shape)}")
        self._check_size(tensor.numel() * _BYTES[kept])
        constant = _constant(tensor, kept)
        self._by_name[constant.name] = constant
        self._check_size(sum(len(each.data) for each in self._by_name.values()))
        return constant

    def _check_size(self, size: int) -> None:
        if size > CONSTANT_BYTES:
            raise RefusedValueError(
                f"expected at most {CONSTANT_BYTES} bytes of tensors that a function closes over, got {size}: "
                "larger ones are given at each call, as `inputs`"
            )


def _constant(tensor: Any, dtype: str) -> Constant:
    torch = sys.modules["torch"]
    tensor = tensor.detach().cpu().contiguous()
    if dtype == "int32":
        low, high = int(tensor.min()), int(tensor.max())
        if not -(1 << 31) <= low <= high < 1 << 31:
            raise RefusedValueError(f"expected a tensor of numbers that int32 holds, got {low} to {high}")
    data = tensor.to(getattr(torch, dtype)).reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = tuple(int(extent) for extent in tensor.shape)
    digest = hashlib.sha256(f"{dtype} {shape} ".encode() + data).hexdigest()
    return Constant(f"table_{digest[:16]}", dtype, shape, data)
