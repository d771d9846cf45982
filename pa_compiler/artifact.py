"""What a build leaves in a directory, pa.so and the texts of the stages, and how that becomes a module."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pa_compiler import dependencies
from pa_compiler.backend import Built
from pa_compiler.runtime import load as _load
from pa_compiler.runtime import manifest
from pa_compiler.runtime.loader import open_library
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

STAGE_FILES = {
    "tensorir": "tensorir.py",
    "scheduled": "scheduled.py",
    "cuda": "kernels.cu",
    "host": "host.cc",
    "llvm": "kernels.ll",
    "asm": "kernels.s",
    "ptx": "kernels.ptx",
    "sass": "kernels.sass",
}
"""What the stages produce, in order: the name in Module.sources, and the file. Each target has some of them."""

_LINKS = "links.json"
"""The file that says which sblock each line of them comes from."""


def build_into(directory: Path, spec: PagedAttentionSpec, pipeline: str, build: Callable[[Path], Built]) -> None:
    """Build in a folder of an empty directory; leave there pa.so, sealed, the texts of the stages, and their links."""
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=directory) as scratch:  # goes with directory
        built = build(Path(scratch))
        about = manifest.Manifest(
            spec=spec,
            pipeline=pipeline,
            target=built.target,
            machine=built.machine,
            features=built.features,
            kernels=hashlib.sha256(built.kernels.encode()).hexdigest(),
            versions=dependencies.versions(),
        )
        (directory / "pa.so").write_bytes(manifest.seal(built.library.read_bytes(), about))
        for stage, text in built.texts.items():
            (directory / STAGE_FILES[stage]).write_text(text, encoding="utf-8")
        (directory / _LINKS).write_text(built.links.as_json())


def loaded(entry: Mapping[str, bytes], spec: PagedAttentionSpec) -> Module:
    """The module of what a build has left: the files by their names."""
    library = entry["pa.so"]
    sources = {stage: entry[file].decode() for stage, file in STAGE_FILES.items() if file in entry}
    about = manifest.read(library, "pa.so")
    if about.spec == spec:  # where the library states the type of out, the spec may leave it to follow dtype
        about = dataclasses.replace(about, spec=spec)
    return _load.make(library, about, open_library(library, "pa.so"), sources, entry.get(_LINKS, b"").decode())


def in_order(texts: Mapping[str, str]) -> dict[str, str]:
    """Texts in the order of the stages."""
    return {stage: texts[stage] for stage in STAGE_FILES if stage in texts}
