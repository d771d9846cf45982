"""Giving a library's bytes to the system's loader."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
import threading
from pathlib import Path

import tvm_ffi

from pa_compiler.runtime import manifest, versions
from pa_compiler.runtime.elsewhere import Elsewhere, Functions

_LOADED: dict[str, tvm_ffi.Module] = {}
"""By checksum: a library that is loaded again is still one in this process, with one pool of threads."""

_NAME = "pa.so"

_PATHS: set[str] = set()
"""Those of files in memory that were loaded: the system's loader takes a path that it knows for what it has."""


def open_library(library: bytes, name: str) -> Functions:
    """Give a library's bytes to the system's loader, as a file of its own; not one for another architecture.

    So what runs is what was checked, whatever becomes of the user's file; and a file that was replaced is not taken
    for the one that was first loaded under its name, as the system's loader would. The file is in TMPDIR; or, where
    nothing can be written there or nothing there may run, in memory. It is gone when it has been loaded.

    Args:
        library: Sealed, as Module.save writes it.
        name: Of the user's file, for messages.

    Raises:
        RuntimeError: libraries are not tested with this tvm-ffi; or the loader takes neither of them.
    """
    versions.check_runtime()
    about = manifest.read(library, name)
    if about.is_foreign:
        return Elsewhere(about.unfit())
    checksum = manifest.checksum(library)
    if checksum not in _LOADED:
        _LOADED.setdefault(checksum, _opened(library, name))
    return _LOADED[checksum]


def _opened(library: bytes, name: str) -> tvm_ffi.Module:
    try:
        with tempfile.TemporaryDirectory(prefix="pa_compiler.") as directory:
            copy = Path(directory) / _NAME
            copy.write_bytes(library)
            return tvm_ffi.load_module(str(copy))
    except (OSError, RuntimeError, UnicodeError) as error:  # the last, of a folder whose name is not UTF-8
        of_folder = error
    try:
        return _from_memory(library)
    except (OSError, RuntimeError) as error:
        built_with = manifest.read(library, name).versions["apache-tvm-ffi"]
        raise RuntimeError(
            f"{name}: expected a library that the system loads, got from a folder for temporary files, which TMPDIR "
            f"names: {of_folder}; and from memory: {error}. It was built with apache-tvm-ffi {built_with}, and here is "
            f"{tvm_ffi.__version__}"
        ) from of_folder


def _from_memory(library: bytes) -> tvm_ffi.Module:
    """Load it as a file without a folder: /memfd:pa.so in /proc/self/maps."""
    with open(os.memfd_create(_NAME, os.MFD_CLOEXEC), "wb") as file:
        file.write(library)
        file.flush()
        while True:  # a second time, if the system has given the first thread a number that another one has had
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                module = thread.submit(_load, file.fileno()).result()
            if module is not None:
                return module


def _load(descriptor: int) -> tvm_ffi.Module | None:
    """Load an open file by a path of this thread's; None if the path has been used.

    The path ends with the thread: what later reads the files of all libraries, as debuggers and tracebacks do, finds
    nothing there, rather than a file that has got the same descriptor.
    """
    path = f"/proc/self/task/{threading.get_native_id()}/fd/{descriptor}"
    if path in _PATHS:
        return None
    _PATHS.add(path)
    return tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")  # load_module() asks for a name in .so
