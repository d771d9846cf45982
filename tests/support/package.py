"""The source files of the package, in whatever folder they are."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

_PACKAGES = ("pa_compiler", "pa_compiler.schedules", "pa_compiler.templates")
"""The package, and what a checkout has beside it."""


def python_files(packages: Sequence[str] = _PACKAGES) -> dict[str, Path]:
    """Every Python file by its module's name, in one order; a package's own is pa_compiler.kernels.__init__."""
    files = {}
    for package in packages:
        folder = Path(str(importlib.resources.files(package)))
        for path in sorted(folder.rglob("*.py")):
            files[".".join((package, *path.relative_to(folder).with_suffix("").parts))] = path
    return files
