"""How a spec is compiled for a CPU, and why, without running it: decisions, machine code, and the roofline."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pa_compiler import bounds
from pa_compiler.backend import Explanation, Extras, Limits
from pa_compiler.cpu import assembly, backend
from pa_compiler.cpu import target as _target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.assembly import Counts, Loop, count
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.cpu.tiles import CpuTiling
from pa_compiler.cpu.tiles.basis import TILES
from pa_compiler.key_ranges import decodes_by_attend
from pa_compiler.naming import spec_name, variant_name
from pa_compiler.runtime import threads
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import TILE_ROWS, TILE_TOKENS
from pa_compiler.words import counted

PREDICTED_TOKENS = 1000
"""Tokens of context that the predicted time is of."""

COLUMNS = {
    "instructions": "all",
    "fmas": "FMA",
    "dots": "dot",
    "arithmetic": "math",
    "loads": "load",
    "broadcasts": "bcast",
    "embedded": "emb",
    "conversions": "conv",
    "prefetches": "pref",
    "stack_stores": "stack",
}
"""The fields of Counts, and the heads of their columns."""

LEGEND = {
    "line": "where the first of the loops begins in inspect --stage asm",
    "n": "loops that are alike; the other numbers are of one pass through one of them",
    "all": "instructions",
    "FMA": "fused multiply-adds",
    "dot": "dot products of pairs of bfloat16 or of integers, two FMAs each, or of four bytes, four each; a product of "
    "two blocks, bfmmla, is two of them in each lane, and one of two tiles of AMX is 4,096 of them",
    "math": "other float32 arithmetic",
    "load": "vectors read from memory",
    "bcast": "broadcasts",
    "emb": "broadcasts that are an operand of another instruction",
    "conv": "conversions of the cache's elements to float32; or what pairs those of two tokens",
    "pref": "prefetches",
    "stack": "stores to the stack: registers that are spilled, and small buffers",
}

_ORDERS = {
    None: "head tile after head tile, from scores to outputs; instructions prefetch what the next one reads",
    "tokens": "all scores, then all outputs: groups of tokens, each through all heads",
    "heads": "all scores, then all outputs: heads, each through the whole tile",
}
"""By Tiling.sweep."""


def explain(
    spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, limits: Limits, directory: Path
) -> Explanation:
    """Compile as far as to assembly, and read it.

    Raises:
        ValueError: limits name a GPU.
    """
    if limits.gpu is not None:
        raise ValueError(f"gpu: expected --target cuda with it, got {config['kind']!r}")
    cpu = _target.resolve(config)
    extras = Extras(attend=decodes_by_attend(spec, pipeline))
    rows, others = _loop_rows(assembly.loops(backend.emit(spec, config, pipeline, extras, directory)["asm"]))
    remark = f"... and {counted(others, 'inner loop')} without float32 arithmetic."
    heads = ("line", "n", *COLUMNS.values())
    facts = decisions(spec, cpu, pipeline, limits)
    return Explanation(json.loads(cpu.config), facts, heads, rows, list(LEGEND.items()), remark)


def decisions(spec: PagedAttentionSpec, cpu: CpuTarget, pipeline: str, limits: Limits) -> list[tuple[str, str]]:
    """What the policy decides for a spec on a target, and the work of a token."""
    strategy, reason = tiling.choose_strategy(spec, cpu, pipeline)
    tiles = tiling.choose(spec, cpu, pipeline)
    if decodes_by_attend(spec, pipeline):
        tiles = tiling.choose_attend(spec, cpu, pipeline)
        strategy, reason = tiles.strategy, "invariant: decode takes a query token as attend takes several."
    return [
        ("vectors", f"{cpu.vector_registers} registers of {cpu.vector_lanes} float32 lanes"),
        ("pipeline", pipeline),
        ("threads", threads.from_environment().description),
        ("strategy", f"{strategy}. {reason}"),
        ("kernels", f"{variant_name(spec_name(spec), tiles, json.loads(cpu.config)['mcpu'])} in a bundle"),
        *_tile_rows(spec, tiles, cpu),
        *([("tuned", _tuned(cpu))] if cpu.tuned else []),
        *([] if spec.mask_mod is None else [("keys", bounds.in_words(spec))]),
        *_work_rows(spec, tiles.keys.terms, limits),
    ]


def _tile_rows(spec: PagedAttentionSpec, tiles: CpuTiling, cpu: CpuTarget) -> list[tuple[str, str]]:
    """The tiles: of rows and tokens, and what of them lies in registers."""
    if tiles.value_pairs or tiles.rows_in_place:
        read = "read in place and multiplied by AMX, but for copies of values at the ends of what is seen"
    elif tiles.in_tile_registers:
        read = "tiles copied to scratch once for all their rows, values turned, and multiplied by AMX"
    elif tiles.keys.terms == 2:
        values = "values paired in scratch, once for all their rows" if tiles.copy_values else "values too"
        keys = "read in place and multiplied as pairs of bfloat16"
        if tiles.keys.apart:
            numbers = "integers of 16 bits" if tiles.keys.integers else "bfloat16"
            keys = f"converted to pairs of {numbers} in {'scratch' if tiles.copy_keys else 'registers'}"
        read = f"keys {keys}, {values}"
    elif tiles.keys.terms == 4:
        read = "keys read in place and multiplied four codes at a time by integers of 8 bits, values turned in scratch"
    elif tiles.copy_keys:
        read = "tiles converted to float32 in scratch, once for all their rows"
    elif tiles.keys.dtype == "float32":
        read = "read in place"
    else:
        read = "read in place, converted in registers"
    row_tiles = counted(tiles.row_tiles(spec), "tile")
    qk, pv = tiles.qk_sums(cpu.vector_lanes), tiles.pv_sums(cpu.vector_lanes)
    of_all = f"in {{}} of {cpu.vector_registers} registers".format
    rows, dims = tiles.pv_rows, tiles.pv_dims
    if tiles.in_tile_registers:
        if tiles.value_pairs:
            rows, dims = tiles.row_tile, tiles.value_dims
        qk, pv = TILES, dims // 16
        if tiles.rows_in_place:
            rows, dims, qk = tiles.row_tile, tiles.value_dims, tiles.qk_tokens // TILE_TOKENS
            pv = dims // (2 * TILE_ROWS) * -(-2 * rows // TILE_ROWS)
        of_all = "in {} of 8 tile registers".format
    return [
        ("rows", f"row_tile {tiles.row_tile}: {row_tiles} for the {counted(spec.group, 'row')} of a kv head"),
        ("tokens", f"kv_tile {tiles.kv_tile}, token_group {tiles.token_group}"),
        ("KV", f"{read}, {counted(tiles.keys.word, 'element')} a word"),
        ("order", _ORDERS[tiles.sweep] + _in_turn(tiles)),
        ("QK sums", f"{tiles.qk_rows} rows x {tiles.qk_tokens} tokens{_partial(tiles)}, {of_all(qk)}"),
        ("PV sums", f"{rows} rows x {dims} elements of a value, {of_all(pv)}"),
    ]


def _tuned(cpu: CpuTarget) -> str:
    said = (f"{name} {value} of {kernel}" for kernel, fields in cpu.tuned.items() for name, value in fields.items())
    return f"{', '.join(said)}. As the target says, or the record of pa-compiler tune, which PA_TUNE=0 ignores"


def _in_turn(tiles: CpuTiling) -> str:
    if tiles.group_places > 1:
        return f"; values from {tiles.group_places} places of a group in turn"
    return f"; {tiles.streams} places of a tile read in turn" if tiles.streams > 1 else ""


def _partial(tiles: CpuTiling) -> str:
    of = "elements" if tiles.keys.terms < 4 else "fours"
    return f" x {tiles.qk_lanes} {of} of head_dim" if not tiles.scores_in_lanes else ""


def _work_rows(spec: PagedAttentionSpec, dot_elements: int, limits: Limits) -> list[tuple[str, str]]:
    """The work for a token of context, and how long it takes at the least."""
    intensity = spec.token_flops / spec.token_bytes
    work = f"{spec.token_flops:,} FLOPs and {spec.token_bytes:,} bytes"
    of = "of context" if spec.window is None else "in the window"
    rows = [("work", f"{work} a token {of}: {intensity:g} FLOPs a byte")]
    if limits.flops is None or limits.bandwidth is None:
        return [*rows, ("roofline", "--flops and --bandwidth of one core give the least time")]
    flops = limits.flops * dot_elements  # a dot product of pairs has twice the FLOPs of an FMA
    limit = min(flops, limits.bandwidth * intensity)
    bound = "arithmetic" if flops <= limits.bandwidth * intensity else "memory"
    microseconds = PREDICTED_TOKENS * spec.token_flops / limit / 1e3
    return [
        *rows,
        ("roofline", f"{limit:g} GFLOP/s, min({flops:g}, {limits.bandwidth:g} x {intensity:g}): bound by {bound}"),
        ("time", f"{microseconds:,.2f} us for {PREDICTED_TOKENS:,} tokens on one core, at the least"),
    ]


def _loop_rows(loops: list[Loop]) -> tuple[list[Sequence[str] | str], int]:
    """What the loops that compute consist of, those of the same make in one row, and how many others there are."""
    rows: list[Sequence[str] | str] = []
    others = len(loops)
    for function, of_function in itertools.groupby(loops, lambda loop: loop.function):
        same = alike(of_function)
        others -= sum(map(len, same.values()))
        if same:
            rows.append(f"inner loops of {function.removeprefix('__tvm_ffi_')}")
        for counts, lines in same.items():
            numbers = (lines[0], len(lines), *(getattr(counts, name) for name in COLUMNS))
            rows.append([str(number) for number in numbers])
    return rows, others


def alike(loops: Iterable[Loop]) -> dict[Counts, list[int]]:
    """The lines of loops that compute, by what they consist of."""
    lines: dict[Counts, list[int]] = {}
    for loop in loops:
        counts = count(loop.code)
        if counts.fmas or counts.dots or counts.arithmetic or counts.conversions:
            lines.setdefault(counts, []).append(loop.line)
    return lines
