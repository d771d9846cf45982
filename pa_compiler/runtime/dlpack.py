"""Arrays as tvm-ffi's tensors, by DLPack: the same memory. And whether an array may be written."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import tvm_ffi

from pa_compiler.runtime import torch_tensors

CPU = 1
"""DLPack's device type."""

_READ_ONLY, _COPIED = 1, 2
"""Flags of a versioned capsule."""
_VERSION = (1, 0)
"""Of DLPack: the first that has flags, and all that is asked for."""


class _Managed(ctypes.Structure):
    """The beginning of DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def as_tensor(name: str, array: Any, *, written: bool = False) -> tvm_ffi.Tensor:
    """An array as a tensor.

    Raises:
        TypeError, ValueError: there is no way; the argument is named.
    """
    if torch_tensors.is_tensor(array):
        torch_tensors.check(name, array)
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
    except BufferError as error:  # it may be willing to hand itself over as read-only
        capsule = None if written else _versioned(name, array)
        if capsule is None:
            raise _refusal(name, error) from error
        return tvm_ffi.from_dlpack(capsule)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _refusal(name, error) from error


def writable(name: str, array: Any) -> Any:
    """An array of neither NumPy nor torch, for writing: tvm-ffi's as it is, another one as a tensor.

    Raises:
        TypeError: it is no array.
        ValueError: it is not known to be writable. DLPack before 1.0 says nothing of that.
    """
    if isinstance(array, tvm_ffi.Tensor) or hasattr(type(array), "__tvm_ffi_object__"):
        return array
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name}: expected an array with DLPack, got {type(array).__name__}")
    capsule = _versioned(name, array)
    if capsule is None:
        raise ValueError(
            f"{name}: expected an array that is known to be writable (NumPy's, torch's, tvm-ffi's, or one that says so "
            f"by DLPack 1), got {type(array).__module__}.{type(array).__name__}, which does not say"
        )
    managed = _Managed.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
    if managed.major != _VERSION[0]:
        raise ValueError(f"{name}: expected DLPack {_VERSION[0]}, got {managed.major}.{managed.minor}")
    if managed.flags & _READ_ONLY:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if managed.flags & _COPIED:
        raise ValueError(f"{name}: expected an array that hands over its own memory, got a copy of it")
    return tvm_ffi.from_dlpack(capsule)


def _versioned(name: str, array: Any) -> Any:
    """An array's capsule with a version, or None where its library has none.

    Raises:
        TypeError: it refuses.
    """
    try:
        capsule = array.__dlpack__(max_version=_VERSION)
    except TypeError:  # the method has no such argument
        return None
    except (BufferError, RuntimeError, ValueError) as error:
        raise _refusal(name, error) from error
    return capsule if _capsule_name(capsule) == b"dltensor_versioned" else None


def _refusal(name: str, error: Exception) -> TypeError:
    reason = str(error).partition("\n")[0]  # torch's have a backtrace behind it
    return TypeError(f"{name}: expected an array with DLPack, got one that refuses: {reason}")


class _Writable:
    """A read-only NumPy array's memory, declared writable: DLPack before 1.0 cannot say that an array is read-only."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
