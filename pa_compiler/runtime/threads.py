"""Where the work of a call on a CPU runs: how many threads, whose, and on which CPUs."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Collection, Iterable
from typing import NamedTuple

from pa_compiler.interface import THREADING
from pa_compiler.runtime.arguments import whole_number

MOST = 2**63 - 1
"""Threads that the library counts to."""


class Threads(NamedTuple):
    """Settings of a module; None where nobody has set them, and the defaults count.

    Attributes:
        num_threads: Threads of a call at most.
        threading: One of THREADING.
        cpus: CPUs for the threads of the module's own pool.
        process_cpus: CPUs of the process when the module was made.
    """

    num_threads: int | None
    threading: str
    cpus: frozenset[int] | None
    process_cpus: frozenset[int]

    @property
    def usable_cpus(self) -> frozenset[int]:
        """CPUs for the threads of the module's own pool: those set, or else the process's."""
        return self.process_cpus if self.cpus is None else self.cpus

    @property
    def limit(self) -> int:
        """Threads of a call at most: as many as set, or else one for each CPU."""
        return len(self.usable_cpus) if self.num_threads is None else self.num_threads

    @property
    def description(self) -> str:
        """Whose threads a call takes, and where they run, in one sentence."""
        own = f"threads of the library's own on CPU {text(self.usable_cpus)}"
        words = {
            "auto": f"on OpenMP's team where the process has one, else {own}",
            "own": own,
            "openmp": "on OpenMP's team",
        }
        return f"{self.limit} at most, {words[THREADING[self.number]]}"

    @property
    def number(self) -> int:
        """The library's number for threading. Whoever sets CPUs means threads that can be put there: the pool's own."""
        return THREADING.index("own" if self.threading == "auto" and self.cpus is not None else self.threading)


def from_environment() -> Threads:
    """A new module's settings: PA_NUM_THREADS, PA_THREADING and PA_CPUS.

    Raises:
        ValueError: one of them is not what it should be; it is named.
    """
    num_threads, cpus = os.environ.get("PA_NUM_THREADS"), os.environ.get("PA_CPUS")
    if num_threads is not None and (not num_threads.isdecimal() or len(num_threads) > 18 or int(num_threads) < 1):
        raise ValueError(
            f"PA_NUM_THREADS: expected a whole number from 1 on, of at most 18 digits, got {num_threads!r}"
        )
    mode = os.environ.get("PA_THREADING", "auto")
    settings = Threads(
        None if num_threads is None else int(num_threads),
        checked_threading("PA_THREADING", mode),
        None if cpus is None else checked_cpus("PA_CPUS", _parsed("PA_CPUS", cpus)),
        process_cpus(),
    )
    warn_of_one_cpu(settings)
    return settings


def process_cpus() -> frozenset[int]:
    """The CPUs that at least one of the process's threads may use.

    An engine may have bound the calling thread to one of them, as OpenMP binds its own.
    """
    found = set(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # no /proc
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                found |= os.sched_getaffinity(int(task))
    return frozenset(found)


def checked_threading(name: str, value: object) -> str:
    """One of THREADING.

    Raises:
        ValueError: it is none.
    """
    if value not in THREADING:
        raise ValueError(f"{name}: expected one of {', '.join(THREADING)}, got {value!r}")
    return str(value)


def checked_cpus(name: str, cpus: Iterable[int]) -> frozenset[int]:
    """CPUs that threads of this process can be bound to.

    Raises:
        TypeError, ValueError: there are none, or the system does not let a thread run on them.
    """
    if isinstance(cpus, str) or not isinstance(cpus, Iterable):
        raise TypeError(
            f"{name}: expected numbers of CPUs, such as {{0, 1}}, got {cpus!r} of type {type(cpus).__name__}"
        )
    wanted = list(cpus)
    for cpu in wanted:
        whole_number(name, cpu, 0)
    if not wanted:
        raise ValueError(f"{name}: expected one CPU at least, got none")
    refused = set(wanted) - _allowed(wanted)
    if refused:
        raise ValueError(
            f"{name}: expected CPUs that the system lets this process use, got {text(wanted)}, of which it refuses "
            f"{text(refused)}"
        )
    return frozenset(wanted)


def _allowed(cpus: Collection[int]) -> set[int]:
    """Those of some CPUs that a thread can be bound to, found out by one that ends."""
    found: set[int] = set()

    def bind() -> None:
        with contextlib.suppress(OSError, OverflowError):
            os.sched_setaffinity(0, cpus)
            found.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=bind)
    thread.start()
    thread.join()
    return found


def text(cpus: Iterable[int]) -> str:
    """CPUs as Linux writes lists of them: 0-3,8."""
    numbers = sorted(cpus)
    starts = [cpu for cpu in numbers if cpu - 1 not in numbers]
    ends = [cpu for cpu in numbers if cpu + 1 not in numbers]
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def _parsed(name: str, listed: str) -> list[int]:
    """The CPUs of a list in Linux's format."""
    cpus: list[int] = []
    for part in listed.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1 << 16):
            raise ValueError(f"{name}: expected CPUs in the form 0-3,8, got {listed!r}")
        cpus += range(int(first), int(last) + 1)
    return cpus


_warned = False


def warn_of_one_cpu(settings: Threads) -> None:
    """Warn, once in a process, of threads that all have one CPU of several to run on."""
    global _warned
    cpus, machine = settings.usable_cpus, os.cpu_count() or 1
    if _warned or settings.limit == 1 or len(cpus) > 1 or machine == 1:
        return
    _warned = True
    warnings.warn(
        f"num_threads is {settings.limit}, and the process may use one of {machine} CPUs, number {text(cpus)}: more "
        "threads make it no faster. Module.cpus and PA_CPUS say which CPUs to use.",
        RuntimeWarning,
        stacklevel=3,
    )
