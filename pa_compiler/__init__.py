"""pa_compiler: compiles paged attention for the exact shape of a model.

Importing it imports what loading and running a library needs, and nothing of the compiler: compile, tune and bundle are
imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pa_compiler import reference
from pa_compiler.interface import AttendItem, PrefixItem, WorkItem
from pa_compiler.layout import convert_cache
from pa_compiler.runtime.cuda_module import CudaModule
from pa_compiler.runtime.load import load
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import accuracy

if TYPE_CHECKING:
    from pa_compiler.bundles.bundle import bundle
    from pa_compiler.compiler import compile  # noqa: A004  (the public name)
    from pa_compiler.tuning import tune

__all__ = [
    "AttendItem",
    "CudaModule",
    "Module",
    "PagedAttentionSpec",
    "PrefixItem",
    "WorkItem",
    "accuracy",
    "bundle",
    "compile",
    "convert_cache",
    "load",
    "reference",
    "tune",
]


_COMPILES = {
    "bundle": "pa_compiler.bundles.bundle",
    "compile": "pa_compiler.compiler",
    "tune": "pa_compiler.tuning",
}
"""What is imported when it is asked for, and where it is."""


def __getattr__(name: str) -> Any:
    if name not in _COMPILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_COMPILES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
