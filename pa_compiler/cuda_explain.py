"""How a spec is compiled for a GPU, and why, without one: tiles, occupancy, machine code, and the roofline."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pa_compiler import cuda_build, cuda_compiler, cuda_tiling, gpus, installation, interrupts, report, turns
from pa_compiler import target as _target
from pa_compiler.cases import Case
from pa_compiler.cuda_target import CudaTarget
from pa_compiler.spec import PagedAttentionSpec

BATCH, TOKENS = 64, 4096
"""Sequences, and tokens of each, of the call that the predicted time is of."""

_COLUMNS = {
    "copy": r"LDGSTS.*",
    "ldsm": r"LDSM.*",
    "mma": r"HMMA.*",
    "FMA": r"FFMA.*",
    "exp": r"MUFU\.EX2",
    "shfl": r"SHFL.*",
    "load": r"LDG\..*",
    "store": r"STG.*",
}
"""Instructions of SASS, by the title of their column."""

_LEGEND = """\
copy   asynchronous copies from the caches to shared memory, 16 bytes a lane
ldsm   ldmatrix: fragments of keys and values from shared memory
load   loads from memory; store: stores to it"""

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


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
    tiles: cuda_tiling.CudaTiling
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
    spec: PagedAttentionSpec, target: _target.TargetLike, pipeline: str = "fused", gpu: str | None = None
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
    chip = CudaTarget(_target.normalize(target)["arch"])
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
        return cubin.resources, {kernel: Counter(_OPCODE.findall(text)) for kernel, text in sass.items()}


def print_explanation(console: Console, explanation: CudaExplanation) -> None:
    """Print all of it."""
    table, spec = report.facts(), explanation.spec
    for label, text in report.spec_rows(spec)[:2]:
        table.add_row(label, text)
    table.add_row("target", report.target_text(explanation.target.config))
    table.add_row("strategy", f"{explanation.tiles.strategy}. {explanation.reason}")
    for label, text in (*_tile_rows(explanation), *_work_rows(explanation)):
        table.add_row(label, text)
    console.print(table)
    _print_kernels(console, explanation)


def _tile_rows(explanation: CudaExplanation) -> list[tuple[str, str]]:
    """The tiles, and what a thread block takes of an SM."""
    spec, tiles, fits = explanation.spec, explanation.tiles, explanation.residence
    row_tiles = report.counted(tiles.row_tiles(spec), "tile")
    of_group = report.counted(spec.group, "row")
    width = f"{report.counted(tiles.lanes, 'lane')} a token" if tiles.strategy == "fma" else "mma.m16n8k16"
    in_flight = (tiles.stages - 1) * tiles.warps * 2 * tiles.tile_bytes(spec) * fits.blocks
    return [
        ("rows", f"row_tile {tiles.row_tile}: {row_tiles} for the {of_group} of a kv head, {width}"),
        (
            "rings",
            f"{report.counted(tiles.warps, 'warp')} x {tiles.stages} stages x {tiles.tile_tokens} tokens of keys and "
            f"values: {tiles.shared_bytes(spec):,} bytes of shared memory a thread block",
        ),
        (
            "resident",
            f"{report.counted(fits.blocks, 'thread block')} on an SM: {fits.registers} by registers, {fits.shared} by "
            f"shared memory, {fits.threads} by threads",
        ),
        ("in flight", f"{in_flight:,} bytes an SM, while as many warps compute"),
    ]


def _work_rows(explanation: CudaExplanation) -> list[tuple[str, str]]:
    """The work for a token of context, how it is shared out, and how long it takes at the least."""
    spec, tiles = explanation.spec, explanation.tiles
    one = Case(spec, batch=1, seq_lens=(TOKENS,))
    intensity = one.flops / one.kv_bytes
    work = f"{one.flops // TOKENS:,} FLOPs and {one.kv_bytes // TOKENS:,} bytes"
    rows = [("work", f"{work} a token of context: {intensity:g} FLOPs a byte")]
    gpu = explanation.gpu
    if gpu is None:
        return [*rows, ("roofline", "--gpu gives the time that is predicted")]
    chip = gpus.GPUS[gpu]
    flops = chip.tensor_flops if tiles.strategy == "tensor_cores" else chip.flops
    limit = min(flops, chip.bandwidth * intensity)
    bound = "arithmetic" if flops <= chip.bandwidth * intensity else "memory"
    resident = chip.multiprocessors * explanation.residence.blocks
    extra = cuda_tiling.extra_items(tiles.head_tiles(spec), resident)
    ranges = cuda_tiling.ranges(tiles, [TOKENS] * BATCH, extra)
    blocks = sum(ranges) * tiles.head_tiles(spec)
    partial_bytes = 2 * sum(count for count in ranges if count > 1) * spec.num_heads * (spec.head_dim + 2) * 4
    total = Case(spec, batch=BATCH, seq_lens=(TOKENS,))
    microseconds = max(total.flops / flops, total.kv_bytes / chip.bandwidth) / 1e3
    return [
        *rows,
        (
            "plan",
            f"{BATCH} sequences of {TOKENS:,} tokens: {report.counted(ranges[0], 'range')} each, {blocks:,} thread "
            f"blocks, {blocks / resident:.1f} times what the {gpu} runs at once",
        ),
        ("partials", f"{partial_bytes:,} bytes written and read, {partial_bytes / total.kv_bytes:.1%} of the caches'"),
        (
            "roofline",
            f"{gpu}: {limit:,.0f} GFLOP/s, min({flops:,.0f}, {chip.bandwidth:g} x {intensity:g}): bound by {bound}",
        ),
        ("time", f"{microseconds:,.1f} us for those sequences, at the least"),
    ]


def _print_kernels(console: Console, explanation: CudaExplanation) -> None:
    """Print what each kernel takes, and what its machine code consists of."""
    counts = explanation.instructions
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("kernel", overflow="fold")
    for title in ("registers", "spilled", *(["instr.", *_COLUMNS] if counts else [])):
        table.add_column(title, justify="right", overflow="fold")
    for kernel, resources in sorted(explanation.resources.items()):
        cells = [str(resources.registers), str(resources.spill_bytes)]
        if counts:
            of_kernel = counts[kernel]
            cells += [str(of_kernel.total()), *(str(_count(of_kernel, pattern)) for pattern in _COLUMNS.values())]
        table.add_row(kernel.removeprefix("cuda_"), *cells)
    console.print()
    console.print(table)
    console.print()
    console.print(_LEGEND if counts else "Instructions are counted where there is nvdisasm, NVIDIA's disassembler.")


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))
