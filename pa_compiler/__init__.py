"""pa_compiler: compiles paged attention for the exact shape of a model.

Importing it imports what loading and running a library needs, and nothing of the compiler: compile is imported when it
is first asked for.
"""

from __future__ import annotations

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
    from pa_compiler.compiler import compile  # noqa: A004  (the public name)

__all__ = [
    "AttendItem",
    "CudaModule",
    "Module",
    "PagedAttentionSpec",
    "PrefixItem",
    "WorkItem",
    "accuracy",
    "compile",
    "convert_cache",
    "load",
    "reference",
]


def __getattr__(name: str) -> Any:
    if name != "compile":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pa_compiler import compiler

    globals()[name] = compiler.compile
    return compiler.compile


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
