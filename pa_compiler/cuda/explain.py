"""How a spec is compiled for a GPU, and why, without one: tiles, occupancy, machine code, and the roofline."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

from pa_compiler import backends, installation, interrupts, turns
from pa_compiler.cuda import backend as cuda_compiler
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import gpus
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.cuda.tiles import CudaTiling
from pa_compiler.spec import PagedAttentionSpec


@dataclasses.dataclass(frozen=True)
class CudaExplanation:
    """What the compiler decides for a spec on a GPU, and the machine code that comes of it.

    Attributes:
        spec: What is compiled.
        target: The architecture.
        tiles: What cuda_tiling.choose chose.
        reason: Why it chose tiles.strategy, in one sentence.
        resources: Of each kernel, as ptxas reports them.
        instructions: How often each instruction of SASS occurs, by kernel; None without a disassembler.
        gpu: The name in gpus.GPUS of the one that the predicted time is of, if any.
    """

    spec: PagedAttentionSpec
    target: CudaTarget
    tiles: CudaTiling
    reason: str
    resources: dict[str, cuda_build.Resources]
    instructions: dict[str, Counter[str]] | None
    gpu: str | None

    @property
    def residence(self) -> gpus.Residence:
        """Thread blocks of cuda_decode on an SM."""
        registers = self.resources["cuda_decode"].registers
        shared = self.tiles.shared_bytes(self.spec)
        return gpus.residence(self.target.arch, self.tiles.threads, registers, shared)


def explain(
    spec: PagedAttentionSpec, target: backends.TargetLike, pipeline: str = "fused", gpu: str | None = None
) -> CudaExplanation:
    """Compile as far as to machine code, and read it.

    Args:
        spec: What is compiled.
        target: As for pa_compiler.compile, of kind "cuda".
        pipeline: "fused".
        gpu: A name in gpus.GPUS: what the predicted time is of.

    Raises:
        ValueError: the target has no kernel for the spec, or the GPU is of another architecture.
        RuntimeError: there is no nvcc, or it refuses the code.
    """
    installation.check()
    chip = CudaTarget(backends.normalize(target)["arch"])
    if pipeline != "fused":
        raise ValueError(f"pipeline: expected fused, to explain target cuda, got {pipeline!r}")
    if gpu is not None and gpus.GPUS[gpu].arch != chip.arch:
        alike = [name for name, other in gpus.GPUS.items() if other.arch == chip.arch]
        raise ValueError(f"gpu: expected one of {chip.arch}, {', '.join(alike) or 'of which none is named'}, got {gpu}")
    tiles = cuda_tiling.choose(spec, chip.arch)
    _, reason = cuda_tiling.choose_strategy(spec)
    resources, instructions = interrupts.shielded(lambda: _machine_code(spec, chip))
    return CudaExplanation(spec, chip, tiles, reason, resources, instructions, gpu)


def _machine_code(
    spec: PagedAttentionSpec, chip: CudaTarget
) -> tuple[dict[str, cuda_build.Resources], dict[str, Counter[str]] | None]:
    """What each kernel takes, and its instructions where there is a disassembler."""
    with turns.using_tvm(), tempfile.TemporaryDirectory(prefix="pa_compiler.") as name:
        scratch = Path(name)
        cubin = cuda_build.assemble(cuda_compiler.lower(spec, chip).cuda, chip.arch, scratch)
        if not cuda_build.find_tool("nvdisasm"):
            return cubin.resources, None
        sass = cuda_build.disassemble(cubin, scratch)
        return cubin.resources, {kernel: cuda_build.instructions(code) for kernel, code in sass.items()}
