"""Tensor intrinsics that schedules put in: what TVM has no primitive for."""

from collections.abc import Callable

from tvm.s_tir import TensorIntrin
from tvm.tirx import PrimFunc


def registered(name: str, make: Callable[[], tuple[PrimFunc, PrimFunc]]) -> str:
    """The name, under which the intrinsic is registered: its description and implementation are made once."""
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, *make())
    return name
