"""How near the fused kernel comes to the core's FMA peak: 16 heads on 1 kv head, float32, one thread, KV in cache.

    python benchmarks/in_cache.py

The peak is measured in the same run, by a loop of independent FMAs in the widest vectors that this CPU has; kernel and
probe take turns, and the ratio is printed with its spread. The timed result is checked against float64.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

import pa_compiler
from pa_compiler import build

SPEC = pa_compiler.PagedAttentionSpec(16, 1, 128, 128, "float32")
NUM_TOKENS = 2048  # 2 MB of keys and values: the last-level cache
ROUNDS = 50

PROBE = """
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
// Multiply and add `steps` times in kSums independent vectors; return the floating-point operations done.
extern "C" double fma_probe(long steps, float factor, float* sink) {
  Vector sums[kSums], a = factor - Vector{}, b = 0.5f - Vector{};
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + float(i);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sums[i] = sums[i] * a + b;
      asm volatile("" : "+v"(sums[i]));  // each step is done, not its closed form
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) *sink += sums[i][0];
  return 2.0 * (kBytes / 4) * kSums * steps;
}
"""


def load_probe(directory: Path) -> ctypes._NamedFuncPointer:
    """Compile the probe for this CPU."""
    source, library = directory / "probe.cc", directory / "probe.so"
    source.write_text(PROBE)
    command = [build.cxx(), "-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    probe = ctypes.CDLL(str(library)).fma_probe
    probe.restype = ctypes.c_double
    probe.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
    return probe


def main() -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    num_blocks = NUM_TOKENS // SPEC.block_size
    query = rng.uniform(-0.5, 0.5, (1, SPEC.num_heads, SPEC.head_dim)).astype(np.float32)
    caches = rng.uniform(-1, 1, (2, num_blocks, SPEC.block_size, 1, SPEC.head_dim)).astype(np.float32)
    block_table = rng.permutation(num_blocks).astype(np.int32)[None]
    inputs = (query, *caches, block_table, np.array([NUM_TOKENS], np.int32))
    module = pa_compiler.compile(SPEC)
    module.num_threads = 1
    out = np.empty_like(query)
    flops = 4 * SPEC.num_heads * SPEC.head_dim * NUM_TOKENS
    sink = ctypes.c_float()
    peaks, ours = [], []
    with tempfile.TemporaryDirectory() as directory:
        probe = load_probe(Path(directory))
        for _ in track(range(ROUNDS), "Measuring", transient=True):
            start = time.perf_counter()
            done = probe(100_000, 0.5, ctypes.byref(sink))
            peaks.append(done / (time.perf_counter() - start) / 1e9)
            start = time.perf_counter()
            for _ in range(10):
                module.decode(*inputs, out=out)
            ours.append(10 * flops / (time.perf_counter() - start) / 1e9)
    error = np.abs(out - pa_compiler.reference.decode(*inputs)).max()
    ratios = sorted(100 * mine / peak for mine, peak in zip(ours, peaks, strict=True))
    low, high = ratios[ROUNDS // 10], ratios[-ROUNDS // 10]
    console = Console(highlight=False)
    console.print(f"FMA peak      {statistics.median(peaks):6.1f} GFLOP/s, one thread, median of {ROUNDS} rounds")
    console.print(f"fused decode  {statistics.median(ours):6.1f} GFLOP/s, calls from Python, error {error:.1e}")
    spread = f"10th to 90th percentile {low:.1f} to {high:.1f} %"
    console.print(f"ratio         {statistics.median(ratios):6.1f} % of the peak; {spread}")


if __name__ == "__main__":
    main()
