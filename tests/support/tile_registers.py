"""The tile registers of AMX for kernels that a test calls without a host."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import tvm_ffi.libinfo

from pa_compiler import host, native


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cc")
    with tempfile.TemporaryDirectory() as folder:
        native.write_headers(host.headers(source.read_text()), Path(folder))
        library = Path(folder) / "tile_registers.so"
        paths = (folder, tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
        flags = ["-std=c++17", "-shared", "-fPIC", *(f"-I{path}" for path in paths), "-o", library]
        found = tvm_ffi.libinfo.find_libtvm_ffi()
        subprocess.run(["g++", source, *flags, found], check=True)
        return ctypes.CDLL(str(library))


def shape(rows: int, pairs: int) -> None:
    """This thread has the registers, as a kernel of such a Tiling.tile_shape takes them, from now on."""
    _library().ShapeTileRegisters(rows, pairs)
