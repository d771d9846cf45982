"""Giving a library's bytes to the system's loader."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tvm_ffi

from pa_compiler import manifest, versions

_LOADED: dict[str, tvm_ffi.Module] = {}
"""By checksum: a library that is loaded again is still one in this process, with one pool of threads."""


def open_library(library: bytes, name: str) -> tvm_ffi.Module:
    """Give a library's bytes to the system's loader, as a file of its own.

    So what runs is what was checked, whatever becomes of the user's file; and a file that was replaced is not taken
    for the one that was first loaded under its name, as the system's loader would.

    Raises:
        RuntimeError: libraries are not tested with this tvm-ffi, or the system's loader refuses this one.
    """
    versions.check_runtime()
    checksum = manifest.checksum(library)
    if checksum not in _LOADED:
        with tempfile.TemporaryDirectory(prefix="pa_compiler.") as directory:
            copy = Path(directory) / name
            try:
                copy.write_bytes(library)
            except OSError as error:
                error.filename = str(copy)  # a full disk names no file
                raise
            try:
                _LOADED.setdefault(checksum, tvm_ffi.load_module(str(copy)))
            except RuntimeError as error:
                built_with = manifest.read(library, name).versions["apache-tvm-ffi"]
                raise RuntimeError(
                    f"{name}: the system's loader refuses it: {error}. It was built with apache-tvm-ffi {built_with}, "
                    f"and here is {tvm_ffi.__version__}"
                ) from error
    return _LOADED[checksum]
