"""Work that an exception out of a signal's handler, such as Ctrl-C's KeyboardInterrupt, must not break off anywhere.

A module that is interrupted while it is imported stays half made for the rest of the process, and an exception inside
a pass of TVM's comes back as another one. Handlers run in the main thread alone, so such work runs in a thread of its
own, for which the main thread waits.
"""

from __future__ import annotations

import _thread
import atexit
import contextvars
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_Key = TypeVar("_Key")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_here = threading.local()
_running: set[_Task] = set()


def shielded(work: Callable[[], _Result]) -> _Result:
    """Call work, and return what it returns or raise what it raises.

    Where an exception comes out of a signal's handler meanwhile, work is told to stop, which it does at its next
    check(), and the exception is raised when it has. A second one does not wait for that.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    task = _Task(work)
    try:
        _thread.start_new_thread(task.run, ())
        task.wait()
    except BaseException:
        task.stop()
        task.wait()
        raise
    return task.result()


def check() -> None:
    """In work, between two of its steps: raise KeyboardInterrupt if it is to stop."""
    task = getattr(_here, "task", None)
    if task is not None and task.stopping:
        raise KeyboardInterrupt


def in_threads(work: Callable[[_Key, _Item], _Result], items: Mapping[_Key, _Item]) -> list[_Result]:
    """What work returns for each key and its item, or what it raises, in a thread for each CPU of the process.

    For work that spends its time outside of Python. It is told to stop where the caller is.
    """
    task = getattr(_here, "task", None)

    def begin() -> None:
        _here.task = task

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=begin) as pool:
        return list(pool.map(work, items.keys(), items.values()))


class _Task:
    """One piece of work. Locks of _thread's, since those of threading can be left locked by an interrupt."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._context = contextvars.copy_context()
        self._begun = _thread.allocate_lock()  # taken by the thread, or by who decides that it shall do nothing
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._outcome: list[tuple[Any, BaseException | None]] = []
        self._process = os.getpid()
        self.stopping = False
        _running.add(self)

    def run(self) -> None:
        """What the thread does."""
        if not self._begun.acquire(blocking=False):
            return
        _here.task = self
        try:
            self._outcome.append((self._context.run(self._work), None))
        except BaseException as error:
            self._outcome.append((None, error))
        self._done.release()

    def wait(self) -> None:
        """Until the work is done; where it is never begun, not at all.

        In short waits: the system may give a signal to another thread, and does not wake this one, which handles it.
        """
        while not self._outcome and os.getpid() == self._process:
            self._done.acquire(timeout=0.05)
        _running.discard(self)

    def stop(self) -> None:
        """Let the next check() raise; or let the work not begin."""
        self.stopping = True
        if self._begun.acquire(blocking=False):
            self._outcome.append((None, None))

    def result(self) -> Any:
        """What the work returned, or raised."""
        value, error = self._outcome.pop()
        if error is not None:
            raise error
        return value


@atexit.register
def _end() -> None:
    """Work that nobody waits for any more must not be inside of TVM when the interpreter ends."""
    for task in list(_running):
        task.stop()
        task.wait()
