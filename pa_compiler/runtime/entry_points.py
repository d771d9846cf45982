"""The functions of a library that take arrays, which are handed on as they are.

The library checks arrays itself, so here only that is looked at which it cannot see, and more once it has refused them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pa_compiler.interface import Parameter
from pa_compiler.runtime import dlpack, torch_tensors
from pa_compiler.runtime.arguments import NUMPY_DTYPES, shown
from pa_compiler.spec import PagedAttentionSpec

_NDARRAY = np.ndarray
_UNSIGNED = {
    NUMPY_DTYPES[name]: np.dtype(f"u{NUMPY_DTYPES[name].itemsize}")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}
"""The types that NumPy does not have in DLPack, and what arrays of them are declared for a library."""


class EntryPoint:
    """A function of a library: takes arrays, then numbers. An array that cannot be handed over is named.

    Args:
        function: The library's.
        parameters: What it takes, in order, as_uint16 at the end.
        spec: What the library was compiled for.
        on_gpu: Whether its arrays are a GPU's.
    """

    def __init__(
        self, function: Callable[..., None], parameters: Sequence[Parameter], spec: PagedAttentionSpec, on_gpu: bool
    ) -> None:
        arrays = [parameter for parameter in parameters if parameter.dtype]
        self._function = function
        self._names = tuple(parameter.said for parameter in arrays)
        self._dtypes = [[NUMPY_DTYPES[name] for name in each.dtypes(spec, on_gpu)] for each in arrays]
        self._declared = [
            (position, dtype, _UNSIGNED[dtype])
            for position, accepted in enumerate(self._dtypes)
            for dtype in accepted
            if dtype in _UNSIGNED
        ]
        self._written = [parameter.is_written(spec) for parameter in arrays]
        self._optional = [parameter.optional for parameter in arrays]
        self._absent = [parameter.absent(spec) for parameter in arrays]
        self._fields = [parameter.field for parameter in arrays]
        self._on_gpu = on_gpu

    def call(self, arrays: Sequence[Any], values: Sequence[float]) -> None:
        """Call it with its arrays and then its numbers but as_uint16, all in the order of its parameters.

        Raises:
            TypeError, ValueError: an array is of a kind that cannot be handed over, or is not known to be writable.
            Also what the library raises.
        """
        handed: Any = arrays
        as_uint16 = 0
        for array in arrays:
            if array is not None and type(array) is not _NDARRAY:
                handed = self._known(arrays)
                break
        # NumPy has no bfloat16 in DLPack: such an array is handed over as uint16, and its bit in as_uint16 set.
        for position, dtype, unsigned in self._declared:
            array = handed[position]
            if type(array) is _NDARRAY and (array.dtype is dtype or array.dtype == dtype):
                if type(handed) is tuple:
                    handed = list(handed)
                handed[position] = array.getfield(unsigned)  # a view, in half of view's time
                as_uint16 |= 1 << position
        try:
            self._function(*handed, *values, as_uint16)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            self._check_kinds(arrays)
            tensors = [
                None if array is None else dlpack.as_tensor(name, array, written=written)
                for name, array, written in zip(self._names, handed, self._written, strict=True)
            ]
            if not isinstance(error, BufferError):
                raise
            self._function(*tensors, *values, as_uint16)  # NumPy's read-only arrays need more words

    def call_dense(self, arrays: Sequence[Any], values: Sequence[float]) -> None:
        """As call, where arrays are known to be None or dense tensors of torch that mean what lies in memory.

        Raises:
            What the library raises.
        """
        self._function(*arrays, *values, 0)

    def _known(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """Arrays as the library can take them, the same memory, of which some are not NumPy's.

        The common case comes first: dense tensors of torch, which mean what lies in memory.
        """
        tensor_type, on_gpu = torch_tensors.tensor_type(), self._on_gpu
        for array in arrays:
            if type(array) is tensor_type:
                if array.is_neg() or array.requires_grad or (on_gpu and torch_tensors.lacks_memory(array)):
                    break
            elif type(array) is not _NDARRAY and array is not None:
                break
        else:
            return arrays
        return [self._looked_into(position, array) for position, array in enumerate(arrays)]

    def _looked_into(self, position: int, array: Any) -> Any:
        """An array of any kind, as the library can take it."""
        name = self._names[position]
        if array is None:
            return None
        if isinstance(array, np.ndarray):
            if isinstance(array, np.ma.MaskedArray):
                raise TypeError(f"{name}: expected an array without a mask, got a MaskedArray: call filled()")
            return array.view(np.ndarray)
        if torch_tensors.is_tensor(array):
            torch_tensors.check(name, array)
            return array
        return dlpack.writable(name, array) if self._written[position] else array

    def _check_kinds(self, arrays: Sequence[Any]) -> None:
        """Check that arrays are arrays or None, and what the library cannot say of NumPy's and torch's."""
        columns = (self._names, arrays, self._dtypes, self._optional, self._absent, self._fields)
        for name, array, dtypes, optional, absent, field in zip(*columns, strict=True):
            if absent:
                if array is not None:
                    raise TypeError(f"{name}: expected None, since the spec has {absent}, got {shown(array)}")
            elif array is None and field:
                raise TypeError(f"{name}: expected an array, since the spec has {field}, got None")
            elif isinstance(array, np.ndarray):
                if array.dtype not in dtypes:
                    accepted = " or ".join(map(str, dtypes))
                    raise TypeError(f"{name}: expected dtype {accepted}, got {array.dtype}")
            elif torch_tensors.is_tensor(array):
                torch_tensors.check(name, array)
            elif not hasattr(array, "__dlpack__") and (array is not None or not optional):
                raise TypeError(f"{name}: expected an array with DLPack, got {type(array).__name__}")
