"""What compile() asks of a target: each kind of target has one Backend, and backends.py the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pa_compiler.spec import PagedAttentionSpec


class Built(NamedTuple):
    """A library that was built, and what is to be known of it.

    Attributes:
        library: The ELF file, as yet without a manifest, in the directory that the build was given.
        texts: The text of each stage, by the names of Module.sources.
        target: The TVM target dict that the code was made for, with all that was found out about it.
        features: LLVM's names of the instruction sets that a CPU must have to run it, sorted.
        kernels: The machine code of the kernels, as text.
    """

    library: Path
    texts: Mapping[str, str]
    target: dict[str, Any]
    features: tuple[str, ...]
    kernels: str


class Backend(NamedTuple):
    """A kind of target. config is what normalize returned.

    Attributes:
        normalize: (target dict of this kind) -> config, checked, without importing TVM.
        check: (spec, pipeline): refuses by ValueError what the target has no kernel for.
        fingerprint: (config) -> what tells two targets apart in a cache key.
        tools: () -> the programs and variables that a build depends on beside those of the C++ compiler. A RuntimeError
            names a program that is missing.
        emit: (spec, config, pipeline, empty directory) -> the text of every stage.
        build: (spec, config, pipeline, empty directory) -> Built. Both import TVM.
    """

    normalize: Callable[[Mapping[str, Any]], dict[str, Any]]
    check: Callable[[PagedAttentionSpec, str], None]
    fingerprint: Callable[[dict[str, Any]], dict[str, Any]]
    tools: Callable[[], dict[str, object]]
    emit: Callable[[PagedAttentionSpec, dict[str, Any], str, Path], dict[str, str]]
    build: Callable[[PagedAttentionSpec, dict[str, Any], str, Path], Built]
