"""Modules that an engine needs: compiled when a spec is first met, and kept."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import pa_compiler
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

_MODULES: dict[PagedAttentionSpec, Module] = {}
_COMPILED: dict[Module, int] = {}
"""Those that were compiled here, with the threads that their calls use at most."""

_REMEMBERED: list[Any] = []
_LOCK = threading.Lock()


def keep(*modules: Module) -> None:
    """Take modules, loaded ones perhaps or ones for another target, for their specs from now on.

    Raises:
        TypeError: one is no Module.
        ValueError: one has no attend. None is taken then.
    """
    for module in modules:
        if not isinstance(module, Module):
            raise TypeError(f"modules_to_use: expected Modules, got {type(module).__name__}")
        if not module.has_attend:
            raise ValueError(f"modules_to_use: expected modules with attend, got {module}")
    _MODULES.update({module.spec: module for module in modules})
    for each in _REMEMBERED:
        each.cache_clear()


def remembered(num_threads: Callable[[], int]) -> Callable[[Callable[..., Module]], Callable[..., Module]]:
    """A decorator for what finds a module by of(): asked once for the same arguments, until another module is kept.

    Calls of a module that was compiled here use at most as many threads as num_threads() says, the engine's own number.
    Modules that are kept have what their owner has set.
    """

    def decorate(find: Callable[..., Module]) -> Callable[..., Module]:
        remember = functools.cache(find)
        _REMEMBERED.append(remember)

        @functools.wraps(find)
        def found(*arguments: Any) -> Module:
            module = remember(*arguments)
            if module in _COMPILED and module.num_threads != (asked := min(num_threads(), _COMPILED[module])):
                module.num_threads = asked
            return module

        return found

    return decorate


def of(spec: PagedAttentionSpec, *others: PagedAttentionSpec) -> Module:
    """The module of a spec, with attend, for this machine's CPU. A line on stderr says that one is compiled.

    One that there is already of `others` is taken in its place.

    Raises:
        As pa_compiler.compile.
    """
    found = next((_MODULES[each] for each in (spec, *others) if each in _MODULES), None)
    if found is None:
        with _LOCK:
            found = _MODULES.get(spec)
            if found is None:
                print(f"pa_compiler: compiling {spec}", file=sys.stderr, flush=True)
                found = pa_compiler.compile(spec)
                _COMPILED[found] = found.num_threads
                _MODULES[spec] = found
    return found
