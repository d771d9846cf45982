"""What the core that runs this gives: its products a second, and how fast it reads lines in some order beside them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pa_compiler import native
from pa_compiler.prediction.order import LINE, Order
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

// Those of one product of vectors.
extern "C" long operations() { return 2 * (kBytes / 4); }

// Seconds of reading lines that begin at some bytes, each beside PRODUCTS products of vectors, and where FETCHES is 1
// beside the fetch of another line.
extern "C" double read_lines(const char* data, const int64_t* at, const int64_t* fetched, long count, float* sink) {
  Vector sums[kSums], a = 0.5f - Vector{}, b = 0.25f - Vector{};
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + float(i);
  Half low = {}, high = {};
  const auto start = Clock::now();
  for (long i = 0; i < count; ++i) {
    if (FETCHES) __builtin_prefetch(data + fetched[i]);
    low += *reinterpret_cast<const Half*>(data + at[i]);
    high += *reinterpret_cast<const Half*>(data + at[i] + 32);
    for (int all = 0; all < PRODUCTS / kSums; ++all) {
#pragma GCC unroll 32
      for (int k = 0; k < kSums; ++k) {
        sums[k] = sums[k] * a + b;
        asm volatile("" : "+v"(sums[k]));
      }
    }
#pragma GCC unroll 32
    for (int k = 0; k < PRODUCTS % kSums; ++k) {
      sums[k] = sums[k] * a + b;
      asm volatile("" : "+v"(sums[k]));
    }
  }
  const double seconds = since(start);
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) *sink += sums[i][0];
  *sink += low[0] + high[0];
  return seconds;
}
"""


def last_level_cache() -> int:
    """Bytes of the largest cache that CPU 0 can use."""
    return max(_caches().values())


def second_level_cache() -> int:
    """Bytes of the second-level cache of CPU 0."""
    return _caches()[2]


def _caches() -> dict[int, int]:
    """Bytes of the caches of data by their level."""
    found = {}
    for each in _CPU.glob("index*"):
        level, kind, size = ((each / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[int(level)] = int(size[:-1]) * _UNITS[size[-1]]
    return found


class Rates:
    """Measures rates on the calling thread, each anew, with memory of its own that is in no cache before.

    Raises:
        RuntimeError: there is no C++ compiler.
    """

    def __init__(self) -> None:
        self._plain = _probes()
        self._others = _memory(8 * last_level_cache())

    def operations(self) -> float:
        """Float32 operations a second: the best of a few, since one that is interrupted says nothing of a limit."""
        sink = ctypes.c_float()
        return max(float(self._plain.multiply(ctypes.c_long(_STEPS), ctypes.byref(sink))) for _ in range(_TRIES))

    def reading(self, order: Order, busy: float = 0.0) -> float:
        """Seconds of reading an order's lines, each beside products of so many seconds: the median of some times."""
        products = round(busy * self.operations() / self._plain.operations())
        read = _probes(products, order.fetched is not order.loaded).read_lines
        return statistics.median(self._seconds(order, read))

    def stream(self) -> float:
        """Bytes a second of lines that follow each other, four times as many as the last-level cache has: the best."""
        size = 4 * last_level_cache()
        lines = np.arange(0, size, LINE, dtype=np.int64)
        return size / min(self._seconds(Order(lines, lines, size), self._plain.read_lines))

    def _seconds(self, order: Order, read: Callable[..., float]) -> list[float]:
        data, sink, seconds = _memory(order.size + LINE), ctypes.c_float(), []
        for _ in range(_TIMES):
            self._others[::LINE].sum()
            lines = (ctypes.c_void_p(each.ctypes.data) for each in (order.loaded, order.fetched))
            count = ctypes.c_long(len(order.loaded))
            seconds.append(float(read(ctypes.c_void_p(data.ctypes.data), *lines, count, ctypes.byref(sink))))
        return seconds


@functools.cache
def _probes(products: int = 0, fetches: bool = False) -> ctypes.CDLL:
    """The functions of the source, of which the last reads lines beside products of vectors and fetches."""
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "rates.cc"), Path(directory, "rates.so")
        source.write_text(_SOURCE)
        options = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        constants = [f"-DPRODUCTS={products}", f"-DFETCHES={int(fetches)}"]
        native.run([*native.cxx(), *options, *constants, str(source), "-o", str(library)], library)
        functions = ctypes.CDLL(str(library))
    functions.multiply.restype = functions.read_lines.restype = ctypes.c_double
    functions.operations.restype = ctypes.c_long
    return functions


def _memory(size: int) -> np.ndarray:
    found = memory.huge_zeros((size,), np.dtype(np.uint8), mmap.MADV_HUGEPAGE)
    found[::4096] = 1
    return found
