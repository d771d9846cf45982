"""What memory gives in the order in which a call reads it: lines of a trace's steps, read by loads alone.

How fast a core reads goes by the order: prefetchers of the hardware follow runs of lines, and where these are short, no
more lines are on their way than a core's first level has room for.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.prediction.core import LINE, Cache, Sizes
from benchmarks.prediction.trace import Trace
from pa_compiler import native
from pa_compiler.runtime import memory

_TIMES = 9
_SOURCE = r"""
#include <chrono>
#include <cstdint>
typedef float Vector __attribute__((vector_size(32)));
extern "C" double read_lines(const char* data, const int64_t* at, long count, float* sink) {
  Vector a = {}, b = {};
  const auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < count; ++i) {
    a += *reinterpret_cast<const Vector*>(data + at[i]);
    b += *reinterpret_cast<const Vector*>(data + at[i] + 32);
  }
  const auto end = std::chrono::steady_clock::now();
  *sink = a[0] + b[0];
  return std::chrono::duration<double>(end - start).count();
}
"""


def lines(trace: Trace, caches: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """The bytes at which lines of a call's caches begin that no second-level cache has, in order, and the bytes of all.

    The caches are counted as one behind another.
    """
    second = Cache(Sizes().second, Sizes().second_ways)
    begins, size, found = [], 0, []
    for each in caches:
        begins.append((each.ctypes.data, each.ctypes.data + each.nbytes, size - each.ctypes.data))
        size += each.nbytes
    for step in trace.steps:
        if step >= 0 and not second.has(step // LINE):
            found += [step + shift for begin, end, shift in begins if begin <= step < end]
    return np.array(found, np.int64) // LINE * LINE, size


def readers(trace: Trace, caches: list[np.ndarray]) -> set[int]:
    """The numbers of the blocks that access a call's caches."""
    found, block = set(), -1
    for step in trace.steps:
        if step < 0:
            block = -1 - step
        elif any(each.ctypes.data <= step < each.ctypes.data + each.nbytes for each in caches):
            found.add(block)
    return found


class Reader:
    """Reads lines in some order, of memory of its own that is in no cache before."""

    def __init__(self, last_level_cache: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory, "lines.cc"), Path(directory, "lines.so")
            source.write_text(_SOURCE)
            options = ["-O2", "-march=native", "-shared", "-fPIC"]
            subprocess.run([*native.cxx(), *options, "-o", library, source], check=True)
            self._read = ctypes.CDLL(str(library)).read_lines
        self._read.restype = ctypes.c_double
        self._others = _memory(8 * last_level_cache)

    def bandwidth(self, at: np.ndarray, size: int) -> float:
        """Bytes a second of lines that begin at some bytes of so many."""
        data, sink = _memory(size + LINE), ctypes.c_float()
        seconds = []
        for _ in range(_TIMES):
            self._others[::LINE].sum()
            arguments = (ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(at.ctypes.data), ctypes.c_long(len(at)))
            seconds.append(self._read(*arguments, ctypes.byref(sink)))
        return len(at) * LINE / statistics.median(seconds)


def _memory(size: int) -> np.ndarray:
    found = memory.huge_zeros((size,), np.dtype(np.uint8), mmap.MADV_HUGEPAGE)
    found[::4096] = 1
    return found
