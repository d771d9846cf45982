"""CUDA C as TVM emits it, run on the CPU: threads as fibers, instructions as the PTX ISA describes them.

load(source, directory) compiles a text and gives its kernels; kernel.launch(...) runs one on NumPy arrays. What a GPU
would not report ends a launch with an EmulationError that says which thread did what and where:

- an access outside of every argument, a write to a read-only one, and an access that is not aligned for its size
- an access to shared memory that no barrier separates from another thread's (a race), and one to where a cp.async is
  in flight
- lanes of a warp at different warp-wide instructions, and threads that wait for each other

Shared memory holds NaNs before each block, and cp.async copies when it is waited for and no earlier. With
order="reverse" the blocks, warps and lanes that can run do so last first: a kernel whose result depends on it is wrong.
Not modelled: time, caches, bank conflicts of other instructions than ldmatrix, races in global memory, and the order of
a tensor core's sums.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import subprocess
from pathlib import Path

import cuda_text
import filelock
import ml_dtypes
import numpy as np

PARTS = Path(__file__).parent / "emulator"
RUNTIME = "g++ -std=c++17 -O3 -mno-red-zone -fno-semantic-interposition -Wall -Wextra -fPIC -c".split()
KERNELS = (
    "g++ -std=c++17 -O1 -w -fPIC -c -fno-exceptions -fno-strict-aliasing -fwrapv -ffp-contract=off "
    "-fsanitize=thread,alignment -fno-sanitize-recover=alignment"
).split()
"""What sanitizers report, accesses and pointers' alignment, goes to emulator/memory.cc: g++ links without theirs."""

SCALARS = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half": np.dtype(np.float16),
    "nv_bfloat16": np.dtype(ml_dtypes.bfloat16),
    "signed char": np.dtype(np.int8),
    "uchar": np.dtype(np.uint8),
    "uint8_t": np.dtype(np.uint8),
    "short": np.dtype(np.int16),
    "ushort": np.dtype(np.uint16),
    "uint16_t": np.dtype(np.uint16),
    "int": np.dtype(np.int32),
    "uint": np.dtype(np.uint32),
    "uint32_t": np.dtype(np.uint32),
    "int64_t": np.dtype(np.int64),
    "uint64_t": np.dtype(np.uint64),
}
MOST_SHARED = 227 << 10
"""Bytes of shared memory that a block can have on sm_90."""

ORDERS = ("forward", "reverse")


class EmulationError(Exception):
    """What a kernel did that it may not do, and the block and thread that did it."""


class Dim(ctypes.Structure):
    """dim3."""

    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


class Argument(ctypes.Structure):
    """struct Argument of emulator/threads.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("start", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("writable", ctypes.c_int),
    ]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that launch() runs."""

    signature: cuda_text.Signature
    _entry: ctypes._CFuncPtr
    _runtime: ctypes.CDLL

    @property
    def bank_conflicts(self) -> int:
        """Passes over shared memory that ldmatrix took beyond one a matrix, in all launches of this process."""
        return self._runtime.emulator_bank_conflicts()

    def launch(self, grid, block, shared_bytes: int, *arguments, order: str = "forward") -> None:
        """Run a grid of blocks; the numbers of each are an int or up to three.

        Args:
            grid: Blocks of the grid.
            block: Threads of a block.
            shared_bytes: Dynamic shared memory of a block.
            arguments: For each pointer an array of its type, of any strides, whose memory from its first to its last
                element the kernel may use; for each other parameter a number.
            order: "forward" or "reverse".
        """
        parameters = self.signature.parameters
        if len(arguments) != len(parameters):
            raise TypeError(f"{self.signature.name} takes {len(parameters)} arguments, not {len(arguments)}")
        size, count = _dim(grid, "grid"), _dim(block, "block")
        threads = count.x * count.y * count.z
        if not 0 < threads <= (self.signature.max_threads or 1024):
            raise ValueError(f"block: {threads} threads, where the kernel is bound to {self.signature.max_threads}")
        if not 0 <= shared_bytes <= MOST_SHARED:
            raise ValueError(f"shared_bytes: {shared_bytes}, where a block can have {MOST_SHARED}")
        pairs = list(zip(parameters, arguments, strict=True))
        values = [_value(parameter, argument) for parameter, argument in pairs]
        ranges = [_range(parameter, argument) for parameter, argument in pairs if parameter.is_pointer]
        error = self._runtime.emulator_launch(
            self._entry,
            (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)),
            (Argument * len(ranges))(*ranges),
            ctypes.c_size_t(len(ranges)),
            ctypes.byref(size),
            ctypes.byref(count),
            ctypes.c_size_t(shared_bytes),
            ORDERS.index(order),
        )
        if error:
            raise EmulationError(f"{self.signature.name}, {error.decode()}")


def load(source: str, directory: Path) -> dict[str, Kernel]:
    """Compile CUDA C; its kernels by name. Libraries are kept in directory, which processes may share."""
    library, runtime_path = build(source, directory)
    runtime = ctypes.CDLL(str(runtime_path))
    runtime.emulator_launch.restype = ctypes.c_char_p
    runtime.emulator_bank_conflicts.restype = ctypes.c_size_t
    entries = ctypes.CDLL(str(library))
    return {
        signature.name: Kernel(signature, entries[f"{signature.name}_entry"], runtime)
        for signature in cuda_text.signatures(source)
    }


def build(source: str, directory: Path) -> tuple[Path, Path]:
    """Compile CUDA C: the library with NAME_entry(void** values) of each kernel, and the emulator's own."""
    runtime_path = _runtime(directory)
    return _built(directory, cuda_text.to_cpp(source), [*KERNELS, "-I", str(PARTS)], [runtime_path]), runtime_path


@functools.cache
def _runtime(directory: Path) -> Path:
    """The emulator's own library."""
    return _built(directory, "".join(f'#include "{path}"\n' for path in sorted(PARTS.glob("*.cc"))), RUNTIME, [])


def _built(directory: Path, text: str, command: list[str], libraries: list[Path]) -> Path:
    """Compile a C++ text, once for all that share the directory, into a library named after it."""
    headers = "".join(path.read_text() for path in sorted(PARTS.iterdir()))
    name = hashlib.sha256(f"{headers}{command}{libraries}{text}".encode()).hexdigest()[:20]
    source, library = directory / f"{name}.cc", directory / f"{name}.so"
    with filelock.FileLock(directory / f"{name}.lock"):
        if library.exists():
            return library
        source.write_text(text)
        compiled = _run([*command, source, "-o", source.with_suffix(".o")])
        if compiled.returncode == 0:
            compiled = _run(["g++", "-shared", source.with_suffix(".o"), "-o", library, *libraries])
    if compiled.returncode == 0:
        return library
    if unknown := re.search(r"'(\w+)' is not a member of 'ptx'", compiled.stderr):
        raise cuda_text.UnknownTextError(f"an instruction: ptx.h has no function {unknown[1]}")
    raise cuda_text.UnknownTextError(f"{source} does not compile: {compiled.stderr[:2000]}")


def _run(command: list) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, check=False)


def _dim(numbers, what: str) -> Dim:
    """An int, or one to three."""
    numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise ValueError(f"{what}: {numbers} is not one to three positive numbers")
    return Dim(*numbers, *(1,) * (3 - len(numbers)))


def _value(parameter: cuda_text.Parameter, argument) -> np.ndarray:
    """What a parameter is passed, as an array of one element."""
    if not parameter.is_pointer:
        return np.array([argument], SCALARS[parameter.type])
    expected = SCALARS.get(parameter.type)
    if parameter.type != "void" and argument.dtype != expected:
        raise TypeError(f"{parameter.name} is an array of {expected}, not {argument.dtype}")
    return np.array([argument.ctypes.data], np.uint64)


def _range(parameter: cuda_text.Parameter, array: np.ndarray) -> Argument:
    """The memory from an array's first to its last element in order of addresses."""
    reach = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    first, last = sum(min(step, 0) for step in reach), sum(max(step, 0) for step in reach)
    size = last - first + array.itemsize if array.size else 0
    return Argument(parameter.name.encode(), array.ctypes.data + first, size, array.flags.writeable)
