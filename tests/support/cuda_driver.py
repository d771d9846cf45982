"""Modules for a GPU on fake_cuda.cc: their real hosts, in libraries with kernels of the emulator's in place of nvcc's.

The fake is libcuda.so.1 to whatever asks for that from then on: a process that has loaded it has no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from pathlib import Path

import cuda_emulator
import cuda_text
import numpy as np
import tvm_ffi
from cuda_emulator import ORDERS, EmulationError
from dlpack import CUDA, Exported
from tolerances import assert_close_to_oracle

from pa_compiler.cuda import build as cuda_build

FAKE = Path(__file__).with_name("fake_cuda.cc")


class FakeDriver:
    """What tests ask of the fake."""

    def __init__(self, directory: Path) -> None:
        library = directory / "libcuda.so.1"
        command = "g++ -std=c++17 -O1 -Wall -Wextra -Werror -fPIC -shared -Wl,-soname,libcuda.so.1".split()
        subprocess.run([*command, str(FAKE), "-o", str(library), "-ldl"], check=True)
        self._functions = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        self._functions.take_log.restype = ctypes.c_char_p
        _, runtime = cuda_emulator.build('extern "C" __global__ void nothing(float* x) {}', directory)
        self._runtime = ctypes.CDLL(str(runtime))
        self._tensors: list[Tensor] = []
        self.set_order("forward")

    def set_order(self, order: str) -> None:
        """In which order threads run: "forward" or "reverse"."""
        self._functions.use_emulator(self._runtime.emulator_launch, ORDERS.index(order))

    def tensor(self, array: np.ndarray, device: int = 0, writable: bool = True) -> Tensor:
        """A copy of an array in the memory of a GPU, until release()."""
        tensor = Tensor(array, device)
        self._functions.allow(tensor.address, ctypes.c_size_t(tensor.num_bytes), writable)
        self._tensors.append(tensor)
        return tensor

    def release(self) -> None:
        """Wait for all streams, and take the memory of tensors back."""
        self.run()
        for tensor in self._tensors:
            self._functions.forbid(tensor.address)
        self._tensors.clear()

    def run(self) -> None:
        """Wait for all streams."""
        self._functions.run()

    def capture(self, stream: int, begin: bool) -> None:
        """Begin or end to put what is done on a stream into a graph, of which there is one."""
        self._functions.capture(ctypes.c_void_p(stream), begin)

    def replay(self) -> None:
        """Run the graph."""
        self._functions.replay()

    def fail(self, function: str, result: int) -> None:
        """Let a function of the driver fail at its next call."""
        self._functions.fail(function.encode(), result)

    def set_capability(self, device: int, capability: int) -> None:
        """90 for sm_90."""
        self._functions.set_capability(device, capability)

    def resident_blocks(self) -> int:
        """Thread blocks that a GPU runs at once, of any kernel."""
        return self._functions.resident_blocks()

    def contexts_pushed(self) -> int:
        """Contexts that this thread has not given back."""
        return self._functions.contexts_pushed()

    def log(self) -> list[str]:
        """What has been asked of the driver since the last time.

        Raises:
            EmulationError: a kernel did what it may not do.
        """
        lines = self._functions.take_log().decode().splitlines()
        faults = [line for line in lines if line.startswith("fault")]
        if faults:
            raise EmulationError("; ".join(faults))
        return lines

    def launches(self) -> list[str]:
        """The names of the kernels in log(), without cuda_ and _kernel."""
        return re.findall(r"^launch cuda_(\w+)_kernel", "\n".join(self.log()), re.MULTILINE)


class Tensor(Exported):
    """NumPy's memory as that of a GPU: a copy of an array, with its strides, from a multiple of 256 bytes on."""

    def __init__(self, array: np.ndarray, device: int) -> None:
        self.num_bytes = _reach(array)
        memory = np.zeros(self.num_bytes + 256, np.uint8)
        start = -memory.ctypes.data % 256
        copy = np.ndarray(array.shape, array.dtype, memory, start, array.strides)
        copy[...] = array
        self.address = ctypes.c_void_p(memory.ctypes.data + start)
        super().__init__(copy, device=CUDA, device_id=device)


def _reach(array: np.ndarray) -> int:
    """Bytes from an array's first element to its last."""
    if array.size == 0:
        return 0
    return (
        sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize
    )


def emulate(patch, directory: Path) -> None:
    """From now on the kernels of CUDA modules are compiled for the emulator; nvcc is not asked."""

    def assemble(source, arch, scratch):
        return cuda_build.Cubin(ptx=source, image=b"", resources={}, located="")

    def image(cubin, arch, scratch):
        library, _ = cuda_emulator.build(cubin.ptx, directory)
        kernels = (f"{signature.name} {len(signature.parameters)}" for signature in cuda_text.signatures(cubin.ptx))
        return "\n".join(["emulated", str(library), *kernels, "\0"]).encode()

    patch.setattr(cuda_build, "assemble", assemble)
    patch.setattr(cuda_build, "fatbin", image)
    patch.setattr(cuda_build, "tool", lambda name: f"/emulated/{name}")
    patch.setattr(cuda_build, "find_tool", lambda name: None)


@functools.cache
def driver(directory: Path) -> FakeDriver:
    """The one fake of this process."""
    return FakeDriver(directory)


class OnGpu:
    """The inputs of a decode call on a GPU, and where its outputs go."""

    def __init__(self, gpu, inputs, device=0):
        self.inputs, self._gpu = inputs, gpu
        names = ("query", "key_cache", "value_cache", "block_table", "context_lens")
        given = {name: getattr(inputs, name) for name in names}
        self.tensors = {
            name: None if array is None else gpu.tensor(array, device, writable=False) for name, array in given.items()
        }
        self.tensors |= {name: gpu.tensor(array, device, writable=False) for name, array in inputs.heads.items()}
        self.tensors |= {name: gpu.tensor(getattr(inputs, name), device) for name in ("out", "lse")}

    def decode(self, module, lse=True, **others):
        """Call decode."""
        tensors = dict(self.tensors)
        if not lse:
            del tensors["lse"]
        return module.decode(**tensors | others)

    @property
    def results(self):
        """Copies of out and lse as they are."""
        return self.tensors["out"].array.copy(), self.tensors["lse"].array.copy()

    def check(self, spec, lse=True):
        """Compare with the oracle."""
        out, found_lse = self.results
        assert_close_to_oracle(spec, self.inputs, out, found_lse if lse else None)


@contextlib.contextmanager
def stream(number, device=0):
    """Calls on a stream."""
    with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{device}"), number):
        yield
