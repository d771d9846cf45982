"""What one call costs besides the attention: batch 1, context 1, one thread and two.

    python benchmarks/call_overhead.py

From Python, Module.decode is called with NumPy arrays, and with torch tensors where torch is installed, with and
without out. From C++, a small program loads the library and calls its entry point through tvm-ffi's C structs; there a
batch of 0 is measured too, which is the host's checks and plan without a kernel. Each number is the least of many runs
of 100 calls: what the call costs when nothing disturbs it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
import timeit
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm_ffi.libinfo
from rich.console import Console
from rich.table import Table

import pa_compiler
from pa_compiler import native

CALLS, RUNS = 100, 300
NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 128, 128

PROGRAM = r"""
#include <dlfcn.h>
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

// A contiguous array of zeros.
struct Array {
  std::vector<int64_t> shape;
  std::vector<char> data;
  DLTensor tensor;

  Array(DLDataType dtype, std::initializer_list<int64_t> extents) : shape(extents) {
    size_t bytes = dtype.bits / 8;
    for (int64_t extent : shape) bytes *= extent;
    data.resize(bytes);
    tensor = {data.data(), {kDLCPU, 0}, static_cast<int32_t>(shape.size()), dtype, shape.data(), nullptr, 0};
  }
  Array(const Array&) = delete;
};

// program LIBRARY BITS THREADS BATCH HEADS DIM BLOCK CALLS RUNS: prints the least time of a call in microseconds.
int main(int, char** arg) {
  void* library = dlopen(arg[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  auto* decode = reinterpret_cast<TVMFFISafeCallType>(dlsym(library, "__tvm_ffi_decode"));
  const int bits = std::atoi(arg[2]);
  const int64_t batch = std::atoi(arg[4]), heads = std::atoi(arg[5]);
  const int64_t dim = std::atoi(arg[6]), block = std::atoi(arg[7]);
  const DLDataType dtype{static_cast<uint8_t>(bits == 16 ? kDLBfloat : kDLFloat), static_cast<uint8_t>(bits), 1};
  const DLDataType int32{kDLInt, 32, 1};
  Array query(dtype, {batch, heads, dim}), keys(dtype, {2, block, 1, dim}), values(dtype, {2, block, 1, dim});
  Array table(int32, {batch, 1}), lens(int32, {batch}), out(dtype, {batch, heads, dim});
  if (batch > 0) *reinterpret_cast<int32_t*>(lens.data.data()) = 1;
  TVMFFIAny args[12] = {}, result{};
  int count = 0;
  for (Array* array : {&query, &keys, &values, &table, &lens, &out}) {
    args[count].type_index = kTVMFFIDLTensorPtr;
    args[count++].v_ptr = &array->tensor;
  }
  args[count++].type_index = kTVMFFINone;  // lse
  args[count].type_index = kTVMFFIFloat;
  args[count++].v_float64 = 0.1;
  for (int64_t number : {std::atoi(arg[3]), 0, 0, 0}) {  // threads, of whichever kind, on any CPU; no NumPy's bfloat16
    args[count].type_index = kTVMFFIInt;
    args[count++].v_int64 = number;
  }
  double least = 1e9;
  const int calls = std::atoi(arg[8]), runs = std::atoi(arg[9]);
  for (int run = 0; run < runs; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) {
      if (decode(nullptr, args, count, &result) != 0) return std::fprintf(stderr, "decode failed\n"), 1;
    }
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
    least = std::min(least, time.count() / calls);
  }
  std::printf("%f\n", least);
}
"""


def build_program(directory: Path) -> Path:
    """Compile PROGRAM."""
    source, program = directory / "call.cc", directory / "call"
    source.write_text(PROGRAM)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    flags = [flag for path in includes for flag in ("-isystem", path)]
    subprocess.run([*native.cxx(), "-std=c++17", "-O2", *flags, source, "-o", program, "-ldl"], check=True)
    return program


def from_cpp(program: Path, library: Path, dtype: str, threads: int, batch: int) -> float:
    """Microseconds of a call from C++."""
    bits = {"bfloat16": 16, "float32": 32}[dtype]
    numbers = (bits, threads, batch, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, CALLS, RUNS)
    libraries = str(Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent)
    done = subprocess.run(
        [program, library, *map(str, numbers)],
        env={"LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def from_python(module: pa_compiler.Module, kind: Any, dtype: Any, int32: Any, *, with_out: bool) -> float:
    """Microseconds of a call from Python; kind is numpy or torch."""
    arrays = {
        "query": kind.ones((1, NUM_HEADS, HEAD_DIM), dtype=dtype),
        "cache": kind.ones((2, BLOCK_SIZE, 1, HEAD_DIM), dtype=dtype),
        "table": kind.zeros((1, 1), dtype=int32),
        "lens": kind.ones(1, dtype=int32),
        "out": kind.ones((1, NUM_HEADS, HEAD_DIM), dtype=dtype) if with_out else None,
    }
    timer = timeit.Timer(
        "decode(query, cache, cache, table, lens, None, out)", globals={"decode": module.decode} | arrays
    )
    return min(timer.repeat(RUNS, CALLS)) / CALLS * 1e6


def main() -> None:
    """Measure, and print a table."""
    console = Console()
    table = Table("dtype", "threads", "caller", "out", "us a call", title="batch 1, context 1")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = build_program(directory)
        for dtype in ("bfloat16", "float32"):
            spec = pa_compiler.PagedAttentionSpec(NUM_HEADS, 1, HEAD_DIM, BLOCK_SIZE, dtype)
            module = pa_compiler.compile(spec)
            library = directory / f"{dtype}.so"
            module.save(library)
            callers = [("NumPy", np, np.dtype(getattr(ml_dtypes, dtype, dtype)), np.int32)]
            if importlib.util.find_spec("torch"):
                import torch

                callers.append(("torch", torch, getattr(torch, dtype), torch.int32))
            for threads in (1, 2):
                module.num_threads = threads
                for caller, kind, element, int32 in callers:
                    for with_out in (True, False):
                        time = from_python(module, kind, element, int32, with_out=with_out)
                        row = (dtype, str(threads), caller, "given" if with_out else "new")
                        table.add_row(*row, f"{time:.2f}")
                for batch in (1, 0):
                    time = from_cpp(program, library, dtype, threads, batch)
                    table.add_row(dtype, str(threads), "C++" if batch else "C++, batch 0", "given", f"{time:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
