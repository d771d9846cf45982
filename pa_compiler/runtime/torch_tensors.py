"""torch's tensors: what they have that DLPack loses, what some of them lack, and new ones.

Whoever has made a tensor has imported torch: to know one, it is looked for among what has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class _NoTensor:
    """Has no instances: torch.Tensor where torch has not been imported."""


def tensor_type() -> Any:
    """torch.Tensor."""
    return getattr(sys.modules.get("torch"), "Tensor", _NoTensor)


def is_tensor(value: object) -> bool:
    """Whether it is a tensor of torch, of whatever class."""
    return isinstance(value, tensor_type())


def check(name: str, tensor: Any) -> None:
    """Check that a tensor's memory, shape and strides say all that there is of it.

    Raises:
        TypeError: it is a tensor of another kind.
        ValueError: it has no memory, is a negated view, or is to have a gradient. The argument is named.
    """
    torch = sys.modules["torch"]
    with torch._C.DisableTorchFunctionSubclass():
        if kind := _other_kind(torch, tensor):
            raise TypeError(f"{name}: expected a dense tensor, got {kind}")
        if tensor.is_neg():
            raise ValueError(f"{name}: expected a tensor as it lies in memory, got a negated view: call resolve_neg()")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, got one with requires_grad: call detach(), or this "
                "function under torch.no_grad()"
            )
        if without := _without_memory(tensor):
            raise ValueError(f"{name}: expected a tensor with memory, got {without}")


def lacks_memory(tensor: Any) -> bool:
    """Whether a tensor has no memory of its own to hand over. One without elements has none either.

    Its address does not tell: a view of memory that has been given back begins where its offset ends. That a storage
    has become smaller than what its views span, without being freed, is not looked for, as torch does not either.
    """
    try:
        return not tensor.untyped_storage().data_ptr()
    except RuntimeError:  # it stands for others
        return True


def empty_for(given: Any, extents: Sequence[int], dtype: str, axis: int) -> torch.Tensor:
    """A new tensor [as many as an axis of given has, *extents] beside it, with anything in it."""
    torch, shape = sys.modules["torch"], given.shape
    count = shape[axis] if len(shape) > axis else 0  # one of fewer axes is for the library to refuse
    return torch.empty(count, *extents, dtype=getattr(torch, dtype), device=given.device)


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The memory of a contiguous NumPy array as a tensor, of bfloat16 too, which torch does not take from NumPy.

    Raises:
        ImportError: there is no torch.
    """
    import torch

    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(getattr(torch, array.dtype.name))


def _other_kind(torch: Any, tensor: Any) -> str | None:
    """What a tensor is that is not dense, and what to call."""
    if tensor.is_nested:
        return "a nested one: call to_padded_tensor()"
    if tensor.is_quantized:
        return f"a quantized one ({tensor.dtype}): call dequantize()"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}: call to_dense()"
    if tensor.device.type == "meta":
        return "one on device meta, which has no memory"
    return None


def _without_memory(tensor: Any) -> str | None:
    """What a tensor is that needs memory and has none of its own."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(tensor, fake.FakeTensor):
        return "a fake one"
    try:
        if tensor.untyped_storage().data_ptr() or not tensor.numel():
            return None
        return "one whose storage has been freed"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return f"a {type(tensor).__module__}.{type(tensor).__name__} that stands for others: {reason}"
