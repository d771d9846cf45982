"""How a spec is compiled for a GPU, and why, without one: tiles, occupancy, machine code, and the roofline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pa_compiler.backend import Explanation, Extras, Limits
from pa_compiler.cuda import backend, gpus
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.strategies import choose_strategy
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.cuda.tiles import CudaTiling, FmaTiling
from pa_compiler.interface import GPU_QUERY_TOKENS
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.words import counted

BATCH, TOKENS = 64, 4096
"""Sequences, and tokens of each, of the call that the predicted time is of."""

COLUMNS = {
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

LEGEND = {
    "regs": "registers of a thread",
    "spill": "bytes of them that are spilled to memory",
    "all": "instructions",
    "copy": "asynchronous copies from the caches to shared memory, 16 bytes a lane, of scales 4",
    "ldsm": "ldmatrix: fragments of keys and values from shared memory",
    "mma": "products of fragments by tensor cores",
    "shfl": "exchanges between the lanes of a warp",
    "load": "loads from memory; store: stores to it",
}

Kernels = Mapping[str, cuda_build.Resources]
"""What each kernel takes, as ptxas reports it."""


def explain(
    spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, limits: Limits, directory: Path
) -> Explanation:
    """Compile as far as to machine code, and read it. Of limits, gpu is what the predicted time is of.

    Raises:
        ValueError: the pipeline is another than "fused", or the GPU of another architecture.
        RuntimeError: there is no nvcc, or it refuses the code.
    """
    chip, gpu = CudaTarget(config["arch"]), limits.gpu
    if pipeline != "fused":
        raise ValueError(f"pipeline: expected fused, to explain target cuda, got {pipeline!r}")
    if gpu is not None and gpus.GPUS[gpu].arch != chip.arch:
        alike = [name for name, other in gpus.GPUS.items() if other.arch == chip.arch]
        raise ValueError(f"gpu: expected one of {chip.arch}, {', '.join(alike) or 'of which none is named'}, got {gpu}")
    cubin = cuda_build.assemble(backend.lower(spec, chip, extras=Extras(attend=True)).cuda, chip.arch, directory)
    instructions = None
    if cuda_build.find_tool("nvdisasm"):
        sass = cuda_build.disassemble(cubin, directory)
        instructions = {kernel: cuda_build.instructions(code) for kernel, code in sass.items()}
    return explained(spec, chip, cubin.resources, instructions, gpu)


def explained(
    spec: PagedAttentionSpec,
    chip: CudaTarget,
    kernels: Kernels,
    instructions: Mapping[str, Counter[str]] | None,
    gpu: str | None,
) -> Explanation:
    """What is said of kernels: what they take, and how often each instruction occurs, where a disassembler told it."""
    facts = decisions(spec, chip, kernels["cuda_decode"].registers, gpu)
    heads = ["regs", "spill", *(["all", *COLUMNS] if instructions else [])]
    legend = [(head, said) for head, said in LEGEND.items() if head in heads]
    remark = "" if instructions else "Instructions are counted where there is nvdisasm, NVIDIA's disassembler."
    return Explanation(chip.config, facts, heads, _kernel_rows(kernels, instructions), legend, remark)


def decisions(spec: PagedAttentionSpec, chip: CudaTarget, registers: int, gpu: str | None) -> list[tuple[str, str]]:
    """What the policy decides for a spec on an architecture, whose decode takes so many registers of a thread."""
    tiles = cuda_tiling.choose(spec, chip.arch)
    strategy, reason = choose_strategy(spec)
    fits = gpus.residence(chip.arch, tiles.threads, registers, tiles.shared_bytes(spec))
    return [
        ("strategy", f"{strategy}. {reason}"),
        *_tile_rows(spec, tiles, fits),
        ("attend", _attend_words(spec, cuda_tiling.choose_attend(spec, chip.arch))),
        *_work_rows(spec, tiles, fits.blocks, gpu),
    ]


def _tile_rows(spec: PagedAttentionSpec, tiles: CudaTiling, fits: gpus.Residence) -> list[tuple[str, str]]:
    """The tiles, and what a thread block takes of an SM."""
    row_tiles = counted(tiles.row_tiles(spec), "tile")
    of_group = counted(spec.group, "row")
    width = f"{counted(tiles.lanes, 'lane')} a token" if isinstance(tiles, FmaTiling) else "mma.m16n8k16"
    in_flight = tiles.ring_bytes(spec) // tiles.stages * (tiles.stages - 1) * fits.blocks
    return [
        ("rows", f"row_tile {tiles.row_tile}: {row_tiles} for the {of_group} of a kv head, {width}"),
        (
            "rings",
            f"{counted(tiles.warps, 'warp')} x {tiles.stages} stages x {tiles.tile_tokens} tokens of keys"
            f"{'' if spec.shared_kv else ' and values'}: {tiles.shared_bytes(spec):,} bytes of shared memory a thread "
            "block",
        ),
        (
            "resident",
            f"{counted(fits.blocks, 'thread block')} on an SM: {fits.registers} by registers, {fits.shared} by "
            f"shared memory, {fits.threads} by threads",
        ),
        ("in flight", f"{in_flight:,} bytes an SM, while as many warps compute"),
    ]


def _attend_words(spec: PagedAttentionSpec, tiles: CudaTiling) -> str:
    """The rows of attend's tiles."""
    which = f"{tiles.strategy}, {tiles.warps} warps x {tiles.stages} stages"
    return (
        f"up to {tiles.row_tile} pairs of a query token, of up to {GPU_QUERY_TOKENS}, and one of the "
        f"{counted(spec.group, 'head')} of a kv head: {which}"
    )


def _work_rows(
    spec: PagedAttentionSpec, tiles: CudaTiling, blocks_of_sm: int, gpu: str | None
) -> list[tuple[str, str]]:
    """The work for a token of context, how it is shared out, and how long it takes at the least."""
    intensity = spec.token_flops / spec.token_bytes
    work = f"{spec.token_flops:,} FLOPs and {spec.token_bytes:,} bytes"
    longest = tiles.range_tokens * tiles.most_ranges
    cut = f"ranges of {tiles.range_tokens} tokens from the first on, longer ones from {longest:,} tokens on"
    of = "of context" if spec.window is None else "in the window"
    rows = [("work", f"{work} a token {of}: {intensity:g} FLOPs a byte"), ("ranges", cut)]
    if gpu is None:
        return [*rows, ("roofline", "--gpu gives the least time")]
    chip = gpus.GPUS[gpu]
    flops = chip.tensor_flops if tiles.strategy == "tensor_cores" else chip.flops
    limit = min(flops, chip.bandwidth * intensity)
    bound = "arithmetic" if flops <= chip.bandwidth * intensity else "memory"
    resident = chip.multiprocessors * blocks_of_sm
    workers = BATCH + cuda_tiling.extra_workers(tiles.head_tiles(spec), resident)
    ranges, seen = cuda_tiling.ranges(spec, tiles, [TOKENS] * BATCH), min(TOKENS, spec.window or TOKENS)
    blocks = min(workers, sum(ranges)) * tiles.head_tiles(spec)
    kv_bytes = BATCH * seen * spec.token_bytes
    partial_bytes = 2 * sum(count for count in ranges if count > 1) * spec.num_heads * (spec.result_dim + 2) * 4
    microseconds = max(BATCH * seen * spec.token_flops / flops, kv_bytes / chip.bandwidth) / 1e3
    return [
        *rows,
        (
            "plan",
            f"{BATCH} sequences of {TOKENS:,} tokens: {counted(ranges[0], 'range')} each, taken by {blocks:,} thread "
            f"blocks, {blocks / resident:.1f} times what the {gpu} runs at once",
        ),
        ("partials", f"{partial_bytes:,} bytes written and read, {partial_bytes / kv_bytes:.1%} of the caches'"),
        (
            "roofline",
            f"{gpu}: {limit:,.0f} GFLOP/s, min({flops:,.0f}, {chip.bandwidth:g} x {intensity:g}): bound by {bound}",
        ),
        ("time", f"{microseconds:,.1f} us for those sequences, at the least"),
    ]


def _kernel_rows(kernels: Kernels, counts: Mapping[str, Counter[str]] | None) -> list[Sequence[str] | str]:
    """What each kernel takes, and what its machine code consists of, below its name."""
    rows: list[Sequence[str] | str] = []
    for kernel, resources in sorted(kernels.items()):
        numbers = [resources.registers, resources.spill_bytes]
        if counts:
            of_kernel = counts[kernel]
            numbers += [of_kernel.total(), *(_count(of_kernel, pattern) for pattern in COLUMNS.values())]
        rows += [kernel.removeprefix("cuda_"), [str(number) for number in numbers]]
    return rows


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))
