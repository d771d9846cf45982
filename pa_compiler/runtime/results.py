"""New arrays for what a call returns, of the kind that its caller uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm_ffi

from pa_compiler.runtime import torch_tensors
from pa_compiler.runtime.arguments import NUMPY_DTYPES
from pa_compiler.runtime.dlpack import as_tensor
from pa_compiler.runtime.elsewhere import Functions


def new_like(given: Any, dtype: str, extents: tuple[int, ...], functions: Functions, axis: int = 0) -> Any:
    """A new array [as many as an axis of given has, *extents] of given's kind.

    Of a library's functions it may need view_as_bfloat16.
    """
    if isinstance(given, np.ndarray):
        return np.empty(given.shape[axis : axis + 1] + extents, NUMPY_DTYPES[dtype])
    if torch_tensors.is_tensor(given):
        return torch_tensors.empty_for(given, extents, dtype, axis)
    shape = (*as_tensor("outs" if axis else "query", given).shape[axis : axis + 1], *extents)
    array = np.empty(shape, NUMPY_DTYPES[dtype])
    if dtype == "bfloat16":
        return functions["view_as_bfloat16"](tvm_ffi.from_dlpack(array.view(np.uint16)))
    return tvm_ffi.from_dlpack(array)
