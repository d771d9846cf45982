"""The machine's limits: operations a second and bytes read a second, measured between the rounds of what they judge."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import inputs
from pa_compiler import native
from pa_compiler.verification.cases import Case

_STEPS = 100_000  # of the arithmetic probes: 2 ms or so on one core
_TRIES = 3
_BUFFER = 128 << 20  # bytes read by the bandwidth probes, at least 4 times the last-level cache
_AHEAD = 1024  # bytes
_STREAMS = (1, 4)

FMA, BF16, SHARE = "float32 FMA", "bfloat16 dot", "share"


class Probe:
    """The probes, compiled for this CPU, and the memory that they read."""

    def __init__(self, cache_bytes: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "probe.so"
            source = Path(__file__).with_name("probe.cc")
            options = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
            subprocess.run([*native.cxx(), *options, "-o", library, source], check=True)
            self._functions = ctypes.CDLL(str(library))
        for name in ("fma_rate", "bf16_rate", "read_rate"):
            getattr(self._functions, name).restype = ctypes.c_double
        size = max(_BUFFER, 4 * cache_bytes)
        self._buffers = {kind: inputs.empty((size,), np.dtype(np.uint8), kind == "huge") for kind in ("4 KB", "huge")}
        for buffer in self._buffers.values():
            buffer[:] = 0

    def measure(self, cpus: Sequence[int]) -> dict[str, float]:
        """One round on these CPUs, a thread on each: operations and bytes per second, by name.

        SHARE is the part of the CPUs' time that the probes had: less than 1 where other processes ran there too.
        """
        start, used = time.perf_counter(), time.process_time()
        args = (len(cpus), (ctypes.c_int * len(cpus))(*cpus))
        steps = ctypes.c_long(_STEPS)
        rates = {
            # The best of a few: they are short, and a thread that another process delays says nothing of the limit.
            name: max(function(*args, steps) for _ in range(_TRIES))
            for name, function in ((FMA, self._functions.fma_rate), (BF16, self._functions.bf16_rate))
        }
        for kind, buffer in self._buffers.items():
            for streams in _STREAMS:
                for ahead in (0, _AHEAD):
                    name = f"read, {kind} pages, {streams} streams, prefetch {ahead}"
                    # The last bytes are left out, so that a prefetch does not leave the buffer.
                    data, size = ctypes.c_void_p(buffer.ctypes.data), ctypes.c_long(buffer.size - 4096)
                    rates[name] = self._functions.read_rate(*args, data, size, ctypes.c_long(ahead), streams)
        rates[SHARE] = (time.process_time() - used) / (time.perf_counter() - start) / len(cpus)
        return rates


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The limits on a number of threads.

    Attributes:
        arithmetic: float32 operations per second.
        bf16_arithmetic: bfloat16 operations per second; the same as arithmetic without instructions for it.
        bandwidth: Bytes per second of the fastest way to read.
        reading: Which way that is.
        share: The part of the CPUs' time that the probes had.
    """

    arithmetic: float
    bf16_arithmetic: float
    bandwidth: float
    reading: str
    share: float

    def limit(self, case: Case) -> float:
        """Operations per second that a case can reach at most; its intensity is per byte of keys and values."""
        return min(self.peak(case.spec.dtype), self.bandwidth * case.flops / case.kv_bytes)

    def peak(self, dtype: str) -> float:
        """Operations per second of the instruction that multiplies such elements."""
        return self.bf16_arithmetic if dtype == "bfloat16" else self.arithmetic


def summarise(rounds: Sequence[dict[str, float]]) -> tuple[Roofline, list[Roofline]]:
    """The medians of several rounds, and each round for itself; of the ways to read, the fastest by its median."""
    medians = {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}
    reading = max(medians.keys() - {FMA, BF16, SHARE}, key=lambda name: medians[name])

    def roofline(rates: dict[str, float]) -> Roofline:
        return Roofline(rates[FMA], max(rates[BF16], rates[FMA]), rates[reading], reading, rates[SHARE])

    return roofline(medians), [roofline(rates) for rates in rounds]
