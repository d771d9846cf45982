"""The pipeline of the CUDA target: spec -> kernels -> CUDA C -> machine code, and a host around it, in one library."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pa_compiler import cuda_build, cuda_host, cuda_tiling
from pa_compiler.cuda_target import CudaTarget
from pa_compiler.spec import PagedAttentionSpec

ENTRY_POINTS = ("decode", "append_kv", "check_status")

_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
"""The environment variables that change what nvcc makes of its arguments."""

# TVM is imported inside the functions that compile, as in compiler.py.


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What is known without nvcc: the kernels in TensorIR and in CUDA C, and the host."""

    tensorir: str
    cuda: str
    host: str

    @property
    def texts(self) -> dict[str, str]:
        """By the names of the stages."""
        return {"tensorir": self.tensorir, "cuda": self.cuda, "host": self.host}


def lower(spec: PagedAttentionSpec, target: CudaTarget) -> Lowered:
    """spec -> kernels -> CUDA C -> host.

    Raises:
        ValueError: the target has no kernel for the spec.
    """
    from pa_compiler import build
    from pa_compiler.kernels import cuda

    tiles = cuda_tiling.choose(spec, target.arch)
    mod = cuda.build(spec, tiles)
    tensorir = build.script(mod)  # now: what follows may change the PrimFuncs that it is given
    source = cuda_build.emit(mod, target.arch)
    return Lowered(tensorir, source, cuda_host.render(spec, tiles, target, source, cuda.launches(spec, tiles)))


def machine_texts(lowered: Lowered, target: CudaTarget, directory: Path) -> dict[str, str]:
    """The stages that nvcc makes, by their names."""
    return _machine_texts(cuda_build.assemble(lowered.cuda, target.arch, directory), directory)


def build_library(spec: PagedAttentionSpec, target: CudaTarget, scratch: Path) -> tuple[Path, dict[str, str]]:
    """Lower, compile and link; the library, which lies in scratch, and the texts of the stages.

    Raises:
        RuntimeError: there is no C++ compiler or no nvcc, or one of them refuses the code.
    """
    from pa_compiler import build

    cuda_build.tool("nvcc")  # a missing compiler is said before a second is spent on TVM
    lowered = lower(spec, target)
    with build.compiling_host(lowered.host, scratch) as compiling:  # while nvcc works
        cubin = cuda_build.assemble(lowered.cuda, target.arch, scratch)
        image = cuda_build.fatbin(cubin, target.arch, scratch)
        library = build.link(compiling, cuda_build.embed(image, scratch), scratch, ENTRY_POINTS)
    return library, lowered.texts | _machine_texts(cubin, scratch)


def inputs() -> dict[str, object]:
    """What a build depends on besides the spec, the target, and what a build for a CPU depends on."""
    return {
        "toolkit": {name: _identity(name) for name in ("nvcc", "ptxas", "nvdisasm")},
        "nvcc variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _machine_texts(cubin: cuda_build.Cubin, directory: Path) -> dict[str, str]:
    texts = {"ptx": cubin.ptx}
    if cuda_build.find_tool("nvdisasm"):
        texts["sass"] = cuda_build.disassembly(cubin, directory)
    return texts


def _identity(tool: str) -> list[object] | None:
    """Which of the toolkit's programs would be run: another version is another file."""
    path = cuda_build.find_tool(tool)
    if path is None:
        return None
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]
