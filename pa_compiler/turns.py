"""TVM, one build at a time: its registries are not made for several threads.

What a build compiles in threads of its own are kernels that share nothing (cpu/build.py), by passes that keep nothing.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

from pa_compiler import interrupts

_turns: dict[int, threading.Lock] = {}


def turn() -> threading.Lock:
    """The lock that lets one build at a time use TVM.

    One for each process: a child of fork() must not wait for a thread that only its parent has.
    """
    return _turns.setdefault(os.getpid(), threading.Lock())


@contextlib.contextmanager
def using_tvm() -> Iterator[None]:
    """A turn with TVM. Work that is told to stop waits for none."""
    lock = turn()
    while not lock.acquire(timeout=0.1):
        interrupts.check()
    try:
        _import_tvm()
        with _others_uncollected():
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _others_uncollected() -> Iterator[None]:
    """Let Python look for garbage among new objects alone: a walk through those of TVM's modules takes 0.1 s.

    Where somebody has frozen objects already, nothing is done, since to unfreeze is to unfreeze all.
    """
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()


def _import_tvm() -> None:
    """Import TVM, which asks on the way where the user's cache is: one without a home has none, and needs none."""
    lacks_home = "XDG_CACHE_HOME" not in os.environ and os.path.expanduser("~") == "~"
    if lacks_home:
        os.environ["XDG_CACHE_HOME"] = os.devnull
    try:
        import tvm  # noqa: F401
    finally:
        if lacks_home:
            del os.environ["XDG_CACHE_HOME"]
    interrupts.check()
