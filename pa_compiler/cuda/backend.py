"""The pipeline of the CUDA target: spec -> kernels -> CUDA C -> machine code, and a host around it, in one library."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_compiler import commands, interrupts, native
from pa_compiler.backend import NO_EXTRAS, Built, Extras, Links
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import host as cuda_host
from pa_compiler.cuda import lines
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.host import headers
from pa_compiler.interface import CUDA_ENTRY_POINTS
from pa_compiler.runtime import versions
from pa_compiler.spec import PagedAttentionSpec

ORIGINS = {
    "tensorir": "pa_compiler/cuda/kernels/",
    "cuda": "pa_compiler/cuda/kernels/",
    "host": "templates/cuda/",
}
"""What the text of each stage of the fused pipeline comes from, but for what nvcc makes."""

_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
"""The environment variables that change what nvcc makes of its arguments."""

if TYPE_CHECKING:
    from tvm import IRModule

# TVM is imported inside the functions that compile, as in compiler.py.


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What is known without nvcc.

    Attributes:
        texts: Of each stage by its name, the kernels in CUDA C and the host among them.
        links: Which place each line of these texts comes from.
    """

    texts: dict[str, str]
    links: Links

    @property
    def cuda(self) -> str:
        """The kernels."""
        return self.texts["cuda"]

    @property
    def host(self) -> str:
        """The host, C++."""
        return self.texts["host"]

    def with_host(self, text: str) -> Lowered:
        """With the host of these kernels."""
        return Lowered({**self.texts, "host": text}, self.links)


def lower(spec: PagedAttentionSpec, target: CudaTarget, pipeline: str = "fused", extras: Extras = NO_EXTRAS) -> Lowered:
    """spec -> kernels -> CUDA C -> host; in the staged pipeline, with schedules before the CUDA C.

    Raises:
        ValueError: the target has no kernel for the spec.
        ImportError, RuntimeError: there is no TVM, or one of another version.
    """
    versions.check_compiler()
    from pa_compiler.cuda.kernels import launches as cuda

    if pipeline == "staged":
        return _lower_staged(spec, target, extras)
    tiles = cuda_tiling.choose(spec, target.arch)
    of_attend = cuda_tiling.choose_attend(spec, target.arch) if extras.attend else None
    mod = cuda.build(spec, tiles, of_attend, extras.merge_states)
    lowered = _lowered(target, {"tensorir": lambda: mod})
    launches = cuda.launches(spec, tiles, of_attend, extras.merge_states)
    return lowered.with_host(cuda_host.render_fused(spec, tiles, target, lowered.cuda, launches))


def _lower_staged(spec: PagedAttentionSpec, target: CudaTarget, extras: Extras) -> Lowered:
    from tvm import IRModule

    from pa_compiler.cuda.kernels import launches as cuda
    from pa_compiler.schedules import schedule

    tiles = cuda_tiling.staged(spec)
    stages, others = cuda.build_staged(spec, tiles, extras.merge_states)
    lowered = _lowered(
        target,
        {
            "tensorir": lambda: IRModule({**stages.functions, **others.functions}),
            "scheduled": lambda: IRModule({**schedule(stages, tiles).functions, **others.functions}),
        },
    )
    launches = cuda.staged_launches(spec, extras.merge_states)
    return lowered.with_host(cuda_host.render_staged(spec, tiles, target, lowered.cuda, launches))


def _lowered(target: CudaTarget, stages: Mapping[str, Callable[[], IRModule]]) -> Lowered:
    """The texts of the stages up to CUDA C, which is made of the last of them, and the places of their lines.

    A stage is made when the text of the one before is: it may change the PrimFuncs that it is given.
    """
    from pa_compiler.cuda import places

    known, texts, of_lines = places.Places(), {}, {}
    for name, make in stages.items():
        texts[name], of_lines[name] = known.text(mod := make())
    said = cuda_build.emit(known.mark(mod), target.arch, places.with_calls)
    texts["cuda"], of_lines["cuda"] = places.apart(said)
    return Lowered(texts, Links.made(known.all, of_lines))


def attends(pipeline: str) -> bool:
    """Whether libraries of a pipeline can have attend."""
    return pipeline == "fused"


def emit_portable(
    spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras, directory: Path
) -> dict[str, str]:
    """As emit, without what nvcc makes: it needs none."""
    return lower(spec, CudaTarget(config["arch"]), pipeline, extras).texts


def emit(
    spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras, directory: Path
) -> dict[str, str]:
    """The text of every stage; directory is for intermediate files."""
    target = CudaTarget(config["arch"])
    lowered = lower(spec, target, pipeline, extras)
    cubin = cuda_build.assemble(lowered.cuda, target.arch, directory)
    return lowered.texts | _machine_texts(cubin, target, lowered.links, directory)[0]


def build(spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras, directory: Path) -> Built:
    """Lower, compile and link. The library and intermediate files lie in directory.

    Raises:
        RuntimeError: there is no C++ compiler or no nvcc, or one of them refuses the code.
    """
    target = CudaTarget(config["arch"])
    lowered = lower(spec, target, pipeline, extras)
    interrupts.check()
    with native.compiling_host(lowered.host, directory, headers(lowered.host)) as compiling:  # while nvcc works
        cubin = cuda_build.assemble(lowered.cuda, target.arch, directory)
        image = cuda_build.fatbin(cubin, target.arch, directory)
        tables = {"pa_kernels_image": image} | {constant.name: constant.data for constant in spec.constants}
        entry_points = [name for name in CUDA_ENTRY_POINTS if getattr(extras, name, True)]
        library = native.link(compiling, (), directory, entry_points, tables)
    texts, links = _machine_texts(cubin, target, lowered.links, directory)
    return Built(library, lowered.texts | texts, target.config, (), texts["ptx"], platform.machine(), links)


def tools() -> dict[str, object]:
    """The toolkit's programs, and the variables that change what they make of their arguments.

    Raises:
        RuntimeError: there is no nvcc.
    """
    programs = (cuda_build.find_tool(name) for name in ("ptxas", "nvdisasm"))
    return {
        "nvcc": commands.identity(cuda_build.nvcc()),
        "toolkit": [commands.identity([path]) if path else None for path in programs],
        "nvcc variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _machine_texts(
    cubin: cuda_build.Cubin, target: CudaTarget, links: Links, directory: Path
) -> tuple[dict[str, str], Links]:
    """PTX, and SASS where there is a disassembler; and links of these lines too, by the lines of CUDA C."""
    texts, found = {"ptx": cubin.ptx}, {"ptx": lines.of_ptx(cubin.located)[1]}
    if cuda_build.find_tool("nvdisasm"):
        texts["sass"] = cuda_build.disassembly(cubin, directory)
        located, of_sass = lines.of_sass(cuda_build.located_disassembly(cubin, target.arch, directory))
        if located == texts["sass"]:  # else ptxas makes another code of the same text with lines
            found["sass"] = of_sass
    of_cuda = [-1, *links.of_lines("cuda")]  # line 0 is none
    return texts, links.with_lines({stage: [of_cuda[line] for line in numbers] for stage, numbers in found.items()})


def fingerprint(config: dict[str, Any]) -> dict[str, Any]:
    """What tells two targets apart in a cache key. The host is for this machine's CPUs."""
    return {**config, "machine": platform.machine()}
