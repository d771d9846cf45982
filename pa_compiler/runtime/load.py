"""Modules from libraries: of the class that the target of a library asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pa_compiler.runtime import manifest
from pa_compiler.runtime.cuda_module import CudaModule
from pa_compiler.runtime.elsewhere import Functions
from pa_compiler.runtime.loader import open_library
from pa_compiler.runtime.module import Module


def make(
    library: bytes,
    about: manifest.Manifest,
    functions: Functions,
    sources: Mapping[str, str] | None = None,
    links: str = "",
) -> Module:
    """The module of a library that has been loaded."""
    kind = CudaModule if about.target["kind"] == "cuda" else Module
    return kind(library, about, functions, sources, links)


def load(path: str | os.PathLike[str]) -> Module:
    """Load a library that Module.save wrote. Nothing of it runs before its checksum has matched.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is no library of pa_compiler, of another format, damaged, or made for another CPU than this
            one, whose missing features are named.
    """
    file = Path(path).absolute()
    if not file.is_file():
        raise FileNotFoundError(f"path: expected a library written by Module.save, got {file}")
    library = file.read_bytes()
    about = manifest.read(library, file)
    if unfit := about.unfit():
        raise RuntimeError(f"{file}: {unfit}")
    return make(library, about, open_library(library, file.name))
