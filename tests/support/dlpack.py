"""The least that is a DLPack object: a capsule made by hand, of any device, with or without strides, of any version."""

from __future__ import annotations

import ctypes

import numpy as np

CPU, CUDA = 1, 2
FLOAT, BFLOAT, INT, UINT, BOOL = 2, 4, 0, 1, 6
CODES = {
    "float32": FLOAT,
    "float16": FLOAT,
    "bfloat16": BFLOAT,
    "int32": INT,
    "int64": INT,
    "uint8": UINT,
    "int8": INT,
    "float8_e4m3fn": 10,
    "float8_e5m2": 12,
    "bool": BOOL,
}
READ_ONLY, COPIED = 1, 2


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Exported:
    """A NumPy array's memory behind DLPack's two methods, and nothing else of an array but its shape.

    It owns what its capsules point to, and has to outlive them.

    Args:
        array: Whose memory it is.
        device: DLPack's device type.
        device_id: Of the device.
        byte_offset: Between the address and the first element.
        with_strides: Whether strides are said; without them it is contiguous.
        dtype: DLPack's code and bits; by default the array's.
        major: Version of DLPack that is spoken with who asks for 1; 0 is what has no versions.
        flags: What a capsule with a version says: READ_ONLY, COPIED.
        address: Of the first element; by default the array's.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        device: int = CPU,
        device_id: int = 0,
        byte_offset: int = 0,
        with_strides: bool = True,
        dtype: tuple[int, int] | None = None,
        major: int = 1,
        flags: int = 0,
        address: int | None = None,
    ) -> None:
        self.array = array
        self.shape = array.shape
        self._device, self._major = (device, device_id), major
        axes = ctypes.c_int64 * array.ndim
        self._shape = axes(*array.shape)
        self._strides = axes(*(stride // array.itemsize for stride in array.strides)) if with_strides else None
        code, bits = dtype or (CODES[array.dtype.name], 8 * array.itemsize)
        tensor = _Tensor(
            data=(array.ctypes.data if address is None else address) - byte_offset,
            device_type=device,
            device_id=device_id,
            ndim=array.ndim,
            code=code,
            bits=bits,
            lanes=1,
            shape=self._shape,
            strides=self._strides,
            byte_offset=byte_offset,
        )
        self._managed = _Managed(tensor=tensor)
        self._versioned = _Versioned(tensor=tensor, major=major, flags=flags)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_):
        if self._major and max_version and max_version[0] >= 1:
            return _new_capsule(ctypes.addressof(self._versioned), b"dltensor_versioned", None)
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


class Legacy(Exported):
    """The same, of a library that has not heard of versions."""

    def __dlpack__(self):
        return super().__dlpack__()
