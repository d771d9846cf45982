"""Whose threads run the calls of a module for a CPU, and on which CPUs: what of it a user may set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pa_compiler.runtime import threads
from pa_compiler.runtime.arguments import whole_number
from pa_compiler.runtime.dlpack import as_tensor
from pa_compiler.runtime.elsewhere import Functions


class ThreadSettings:
    """The part of a Module that has them."""

    _functions: Functions
    _threads: threads.Threads
    _thread_numbers: tuple[int, ...]
    """What a call hands over of them: num_threads, threading and cpus in the numbers of the library."""

    def _use(self, settings: threads.Threads) -> None:
        cpus = as_tensor("cpus", np.array(sorted(settings.usable_cpus), np.int32))
        self._threads = settings
        self._thread_numbers = (settings.limit, settings.number, self._functions["cpu_set"](cpus))

    @property
    def _settings(self) -> dict[str, Any]:
        """What goes along with a copy, in this process or another: what somebody has set."""
        settings = {"num_threads": self._threads.num_threads, "threading": self.threading, "cpus": self._threads.cpus}
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def num_threads(self) -> int:
        """Threads that a call uses at most; PA_NUM_THREADS, or else as many as cpus."""
        return self._threads.limit

    @num_threads.setter
    def num_threads(self, value: int) -> None:
        value = whole_number("num_threads", value, 1, threads.MOST)
        settings = self._threads._replace(num_threads=value)
        threads.warn_of_one_cpu(settings)
        self._use(settings)

    @property
    def threading(self) -> str:
        """Whose threads run a call beside the caller's; PA_THREADING, or else "auto".

        "auto": the team of the OpenMP runtime (libgomp, libiomp5, libomp) that the process has loaded, as torch has.
            Its threads go on spinning for a while after each of torch's operations, on the CPUs that others would
            need. A call uses no more of them than the team has. Threads of the module's own run it where there is no
            team of two at least: no runtime, within a parallel region, beside another call that is on the team, in a
            child of fork(), and where cpus was set.
        "own": the module's own threads.
        "openmp": OpenMP's team, whatever its size; within a parallel region and beside another call, the module's own
            threads. A call is a RuntimeError where no runtime is loaded, and in a child of a fork() that came after the
            library was loaded. In one that was forked before, this says that it has begun a team of its own: a runtime
            that still counts on its parent's threads waits for them for ever.
        """
        return self._threads.threading

    @threading.setter
    def threading(self, value: str) -> None:
        self._use(self._threads._replace(threading=threads.checked_threading("threading", value)))

    @property
    def cpus(self) -> frozenset[int]:
        """CPUs that the module's own threads run on; PA_CPUS ("0-3,8"), or else those of the process.

        Those of the process are all that any of its threads might use when the module was made: engines bind the thread
        that calls to one CPU. Setting them makes "auto" mean "own". OpenMP's threads stay where OpenMP has them.
        """
        return self._threads.usable_cpus

    @cpus.setter
    def cpus(self, value: Iterable[int]) -> None:
        settings = self._threads._replace(cpus=threads.checked_cpus("cpus", value))
        threads.warn_of_one_cpu(settings)
        self._use(settings)

    @property
    def openmp(self) -> str | None:
        """The path of the OpenMP runtime on whose team a call from this thread would run under "auto", or None."""
        return self._functions["openmp"]() or None
