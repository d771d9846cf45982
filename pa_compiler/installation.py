"""What of the package is there: a checkout has no templates in it, byte code alone no kernels, and a zip both."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.abc import Traversable

_PACKAGES = ("pa_compiler", "pa_compiler.schedules", "pa_compiler.templates")


def check() -> None:
    """Refuse to compile with a package that is not installed whole. Loading and running libraries needs less.

    Raises:
        ImportError: says what is missing, and how to install it.
    """
    root = Path(__file__).parent
    install = f"to install it: python -m pip install {root.parent}"
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"pa_compiler: expected an installed package, got {root} without {package}; {install}", name=package
            )
    try:
        importlib.metadata.version("pa-compiler")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"pa_compiler: expected an installed package, got {root} without its metadata; {install}"
        ) from error
    if not any(name.endswith(".py") for name, _ in _texts("pa_compiler.kernels")):
        raise ImportError(
            f"pa_compiler.kernels: expected the source that is compiled, got byte code alone in {root}; libraries can "
            "be loaded and run, and are compiled where the package is installed with its source"
        )


def text_digest() -> str:
    """A digest of the text of the package: kernels, schedules, templates and everything between them."""
    texts = {f"{package}/{name}": file for package in _PACKAGES for name, file in _texts(package)}
    digest = hashlib.sha256()
    for place, file in sorted(texts.items()):
        digest.update(f"{place}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def templates() -> dict[str, str]:
    """The text of each template by its name."""
    return {name: file.read_text(encoding="utf-8") for name, file in _texts("pa_compiler.templates")}


def _texts(package: str) -> list[tuple[str, Traversable]]:
    """The source files, headers and templates of a package, in folders of any depth, sorted by their places in it.

    It is not imported, nor TVM with it. Schedules and templates are packages that are asked for by name: in a checkout
    their folders lie beside pa_compiler's.
    """
    found = importlib.util.find_spec(package)
    reader = found.loader.get_resource_reader(package) if found and found.loader else None  # type: ignore[attr-defined]
    return sorted(_below(reader.files(), "")) if reader else []


def _below(folder: Traversable, place: str) -> Iterator[tuple[str, Traversable]]:
    for file in folder.iterdir():
        if file.name.endswith((".py", ".j2", ".h")):
            yield place + file.name, file
        elif "." not in file.name and file.name != "__pycache__" and file.is_dir():
            yield from _below(file, f"{place}{file.name}/")
