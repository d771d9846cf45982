"""Modules that an engine needs: compiled when a spec is first met, and kept."""

from __future__ import annotations

import sys
import threading

import pa_compiler
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

_MODULES: dict[PagedAttentionSpec, Module] = {}
_LOCK = threading.Lock()


def keep(module: Module) -> None:
    """Take a module, one that was loaded perhaps, for its spec from now on."""
    _MODULES[module.spec] = module


def of(spec: PagedAttentionSpec) -> Module:
    """The module of a spec, with attend, for this machine's CPU. A line on stderr says that one is compiled.

    Raises:
        As pa_compiler.compile.
    """
    found = _MODULES.get(spec)
    if found is None:
        with _LOCK:
            found = _MODULES.get(spec)
            if found is None:
                print(f"pa_compiler: compiling {spec}", file=sys.stderr, flush=True)
                found = _MODULES[spec] = pa_compiler.compile(spec)
    return found
