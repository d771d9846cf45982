"""What the core that runs this gives: its products a second, and bytes a second of lines in some order."""

from __future__ import annotations

import ctypes
import mmap
import statistics
import tempfile
from pathlib import Path

import numpy as np

from pa_compiler import native
from pa_compiler.prediction.core import LINE
from pa_compiler.runtime import memory

_TIMES = 9
_STEPS, _TRIES = 100_000, 3  # of products: a few ms
_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SOURCE = r"""
#include <chrono>
#include <cstdint>
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
typedef float Half __attribute__((vector_size(32)));
using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Float32 operations a second, of products that are added to sums which do not wait for each other.
extern "C" double multiply(long steps, float* sink) {
  Vector sums[kSums], a = 0.5f - Vector{}, b = 0.25f - Vector{};
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + float(i);
  const auto start = Clock::now();
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sums[i] = sums[i] * a + b;
      asm volatile("" : "+v"(sums[i]));  // each step is done, not its closed form
    }
  }
  const double seconds = since(start);
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) *sink += sums[i][0];
  return 2.0 * (kBytes / 4) * kSums * steps / seconds;
}

// Seconds of reading lines that begin at some bytes.
extern "C" double read_lines(const char* data, const int64_t* at, long count, float* sink) {
  Half a = {}, b = {};
  const auto start = Clock::now();
  for (long i = 0; i < count; ++i) {
    a += *reinterpret_cast<const Half*>(data + at[i]);
    b += *reinterpret_cast<const Half*>(data + at[i] + 32);
  }
  const double seconds = since(start);
  *sink = a[0] + b[0];
  return seconds;
}
"""


def last_level_cache() -> int:
    """Bytes of the largest cache that CPU 0 can use."""
    sizes = [path.read_text().strip() for path in _CPU.glob("index*/size")]
    return max(int(size[:-1]) * _UNITS[size[-1]] for size in sizes)


class Rates:
    """Measures rates on the calling thread, each anew, with memory of its own that is in no cache before.

    Raises:
        RuntimeError: there is no C++ compiler.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory, "rates.cc"), Path(directory, "rates.so")
            source.write_text(_SOURCE)
            options = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
            native.run([*native.cxx(), *options, str(source), "-o", str(library)], library)
            functions = ctypes.CDLL(str(library))
        self._multiply, self._read = functions.multiply, functions.read_lines
        self._multiply.restype = self._read.restype = ctypes.c_double
        self._others = _memory(8 * last_level_cache())

    def operations(self) -> float:
        """Float32 operations a second: the best of a few, since one that is interrupted says nothing of a limit."""
        sink = ctypes.c_float()
        return max(float(self._multiply(ctypes.c_long(_STEPS), ctypes.byref(sink))) for _ in range(_TRIES))

    def bandwidth(self, at: np.ndarray, size: int) -> float:
        """Bytes a second of lines that begin at some bytes, int64, of so many: the median of some times."""
        return len(at) * LINE / statistics.median(self._seconds(at, size))

    def stream(self) -> float:
        """Bytes a second of lines that follow each other, four times as many as the last-level cache has: the best."""
        size = 4 * last_level_cache()
        at = np.arange(0, size, LINE, dtype=np.int64)
        return size / min(self._seconds(at, size))

    def _seconds(self, at: np.ndarray, size: int) -> list[float]:
        data, sink = _memory(size + LINE), ctypes.c_float()
        seconds = []
        for _ in range(_TIMES):
            self._others[::LINE].sum()
            arguments = (ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(at.ctypes.data), ctypes.c_long(len(at)))
            seconds.append(self._read(*arguments, ctypes.byref(sink)))
        return seconds


def _memory(size: int) -> np.ndarray:
    found = memory.huge_zeros((size,), np.dtype(np.uint8), mmap.MADV_HUGEPAGE)
    found[::4096] = 1
    return found
