"""How a spec is compiled for a GPU, and why, in words: what cuda/explain.py found, printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pa_compiler.cli import printing as report
from pa_compiler.cli import text
from pa_compiler.cuda import gpus
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.explain import CudaExplanation
from pa_compiler.cuda.tiles import FmaTiling
from pa_compiler.verification.cases import Case

if TYPE_CHECKING:
    from rich.console import Console

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

_LEGEND = {
    "regs": "registers of a thread",
    "spill": "bytes of them that are spilled to memory",
    "all": "instructions",
    "copy": "asynchronous copies from the caches to shared memory, 16 bytes a lane",
    "ldsm": "ldmatrix: fragments of keys and values from shared memory",
    "mma": "products of fragments by tensor cores",
    "shfl": "exchanges between the lanes of a warp",
    "load": "loads from memory; store: stores to it",
}


def print_explanation(console: Console, explanation: CudaExplanation) -> None:
    """Print all of it."""
    report.print_facts(
        console,
        [
            *text.spec_rows(explanation.spec)[:2],
            ("target", text.target_text(explanation.target.config)),
            ("strategy", f"{explanation.tiles.strategy}. {explanation.reason}"),
            *_tile_rows(explanation),
            *_work_rows(explanation),
        ],
    )
    _print_kernels(console, explanation)


def _tile_rows(explanation: CudaExplanation) -> list[tuple[str, str]]:
    """The tiles, and what a thread block takes of an SM."""
    spec, tiles, fits = explanation.spec, explanation.tiles, explanation.residence
    row_tiles = text.counted(tiles.row_tiles(spec), "tile")
    of_group = text.counted(spec.group, "row")
    width = f"{text.counted(tiles.lanes, 'lane')} a token" if isinstance(tiles, FmaTiling) else "mma.m16n8k16"
    in_flight = tiles.ring_bytes(spec) // tiles.stages * (tiles.stages - 1) * fits.blocks
    return [
        ("rows", f"row_tile {tiles.row_tile}: {row_tiles} for the {of_group} of a kv head, {width}"),
        (
            "rings",
            f"{text.counted(tiles.warps, 'warp')} x {tiles.stages} stages x {tiles.tile_tokens} tokens of keys"
            f"{'' if spec.shared_kv else ' and values'}: {tiles.shared_bytes(spec):,} bytes of shared memory a thread "
            "block",
        ),
        (
            "resident",
            f"{text.counted(fits.blocks, 'thread block')} on an SM: {fits.registers} by registers, {fits.shared} by "
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
    partial_bytes = 2 * sum(count for count in ranges if count > 1) * spec.num_heads * (spec.result_dim + 2) * 4
    total = Case(spec, batch=BATCH, seq_lens=(TOKENS,))
    microseconds = max(total.flops / flops, total.kv_bytes / chip.bandwidth) / 1e3
    return [
        *rows,
        (
            "plan",
            f"{BATCH} sequences of {TOKENS:,} tokens: {text.counted(ranges[0], 'range')} each, {blocks:,} thread "
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
    heads = ["regs", "spill", *(["all", *_COLUMNS] if counts else [])]
    rows: list[Sequence[str] | str] = []
    for kernel, resources in sorted(explanation.resources.items()):
        numbers = [resources.registers, resources.spill_bytes]
        if counts:
            of_kernel = counts[kernel]
            numbers += [of_kernel.total(), *(_count(of_kernel, pattern) for pattern in _COLUMNS.values())]
        rows += [kernel.removeprefix("cuda_"), [str(number) for number in numbers]]
    report.print_text(console, f"\n{text.table(heads, rows)}\n")
    report.print_facts(console, [(head, said) for head, said in _LEGEND.items() if head in heads])
    if not counts:
        said = "Instructions are counted where there is nvdisasm, NVIDIA's disassembler."
        report.print_text(console, text.wrapped(said, console.width, 0))


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))
