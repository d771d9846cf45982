"""The least that is a DLPack object: a capsule made by hand, of any device, with or without strides."""

from __future__ import annotations

import ctypes

import numpy as np

CPU, CUDA = 1, 2
FLOAT, BFLOAT, INT = 2, 4, 0
CODES = {"float32": FLOAT, "float16": FLOAT, "bfloat16": BFLOAT, "int32": INT, "int64": INT}


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
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Exported:
    """A NumPy array's memory behind DLPack's two methods, and nothing else of an array but its shape.

    It speaks DLPack before 1.0, owns what its capsules point to, and has to outlive them.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        device: int = CPU,
        device_id: int = 0,
        byte_offset: int = 0,
        with_strides: bool = True,
    ) -> None:
        self.array = array
        self.shape = array.shape
        self._device = device, device_id
        axes = ctypes.c_int64 * array.ndim
        self._shape = axes(*array.shape)
        self._strides = axes(*(stride // array.itemsize for stride in array.strides)) if with_strides else None
        self._tensor = _Tensor(
            data=array.ctypes.data - byte_offset,
            device_type=device,
            device_id=device_id,
            ndim=array.ndim,
            code=CODES[array.dtype.name],
            bits=8 * array.itemsize,
            lanes=1,
            shape=self._shape,
            strides=self._strides,
            byte_offset=byte_offset,
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_):
        return _new_capsule(ctypes.addressof(self._tensor), b"dltensor", None)
