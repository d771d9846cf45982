"""What a page shows of a module for a CPU: decisions, strategies, and inner loops with the cycles that bound them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pa_compiler.backend import InnerLoop, Inside, Limits, Option
from pa_compiler.cpu import assembly
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.assembly import Counts, Loop, syntax_of
from pa_compiler.cpu.explain import COLUMNS, LEGEND, alike, decisions
from pa_compiler.cpu.machines import AVX2, NEON, kind_of
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.cpu.tiles import CpuTiling
from pa_compiler.cpu.tiles.basis import Basis, basis
from pa_compiler.cpu.tiles.heads_in_lanes import HeadsInLanes
from pa_compiler.key_ranges import decodes_by_attend
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.words import counted


class Core(NamedTuple):
    """What a core does in a cycle at most, by what its makers say.

    Attributes:
        instructions: Of any kind.
        arithmetic: Instructions on vectors.
        loads: Of a vector each.
        tile_cycles: Cycles of a product of two tiles.
        embedded_loads: Whether broadcasts that are operands of other instructions are loads: lanes are not.
    """

    instructions: int = 6
    arithmetic: int = 2
    loads: int = 2
    tile_cycles: int = 16
    embedded_loads: bool = True


_CORES = {AVX2: Core(instructions=5), NEON: Core(instructions=4, embedded_loads=False)}
"""By kinds of cores. NEON's is Neoverse N1 (Arm's Software Optimization Guide); others are in _NAMED."""
_NAMED = dict.fromkeys(("neoverse-v1", "neoverse-v2", "grace"), Core(8, 4, 3, embedded_loads=False))
"""By LLVM's names of CPUs."""
_MIX = tuple(name for name in COLUMNS if name != "instructions")


def inside(
    spec: PagedAttentionSpec,
    target: Mapping[str, Any],
    features: Sequence[str],
    pipeline: str,
    sources: Mapping[str, str],
    limits: Limits,
) -> Inside:
    """What a library is made of, from what its manifest says and its assembly.

    Raises:
        ValueError: limits name a GPU.
    """
    if limits.gpu is not None:
        raise ValueError(f"gpu: expected a module for a GPU with it, got one for {target['kind']!r}")
    cpu = CpuTarget(json.dumps(target, sort_keys=True), frozenset(features))
    core = core_of(target, cpu)
    of_cycles = (
        f"{core.instructions} instructions, {core.arithmetic} of them on vectors, and {core.loads} loads in a cycle"
    )
    terms = tiling.choose(spec, cpu, pipeline).keys.terms
    return Inside(
        decisions(spec, cpu, pipeline, limits),
        options(spec, cpu, pipeline),
        loops(sources.get("asm", ""), core),
        {COLUMNS[name]: LEGEND[COLUMNS[name]] for name in _MIX},
        of_cycles + (f"; {core.tile_cycles} for a product of tiles" if cpu.tile_registers else ""),
        None if limits.flops is None else limits.flops * terms,
    )


def core_of(target: Mapping[str, Any], cpu: CpuTarget) -> Core:
    """What a core of a target does in a cycle."""
    return _NAMED.get(str(target.get("mcpu")), _CORES.get(kind_of(cpu), Core()))


def options(spec: PagedAttentionSpec, cpu: CpuTarget, pipeline: str) -> list[Option]:
    """The strategies in the order in which they are asked, until one takes the spec, and those after it."""
    known = basis(spec, cpu, pipeline)
    if decodes_by_attend(spec, pipeline):
        tiles = tiling.choose_attend(spec, cpu, pipeline)
        return [Option(tiles.strategy, True, "invariant: decode is a call of attend.", "")]
    chosen, why = tiling.choose_strategy(spec, cpu, pipeline)
    found = []
    for strategy in tiling.STRATEGIES:
        taken = strategy.strategy == chosen
        last = strategy is tiling.STRATEGIES[-1]
        takes, reason = (True, why if taken else "It takes what no other does.") if last else strategy.takes(known)
        if strategy is HeadsInLanes:
            takes = known.rows % known.target.vector_lanes == 0  # what it needs, whatever is preferred to it
        elif not strategy.in_tile_registers:
            takes = True
        found.append(Option(strategy.strategy, taken, reason, _cost(strategy.choose(known), known) if takes else ""))
    return found


def _cost(tiles: CpuTiling, known: Basis) -> str:
    """What is read for the sums of QK that lie in registers at once, for each of them."""
    rows, tokens = tiles.qk_rows, tiles.qk_tokens
    if tiles.in_tile_registers:
        return f"products of tiles, for {counted(rows, 'row')} and {counted(tokens, 'token')} at once"
    lanes, load_cost = known.target.vector_lanes, known.load_cost
    if not tiles.scores_in_lanes:
        sums, loads = rows * tokens, rows + load_cost * tokens
    elif rows % lanes == 0 and tiles.strategy == HeadsInLanes.strategy:
        sums, loads = rows // lanes * tokens, rows // lanes + tokens
    else:
        sums, loads = rows * max(tokens // lanes, 1), rows + load_cost * max(tokens // lanes, 1)
    return f"{loads / sums:.2f} loads for an FMA of QK, whose sums are {counted(sums, 'register')}"


def loops(asm: str, core: Core) -> list[InnerLoop]:
    """The loops of an assembly that compute, those of a function that are alike as one."""
    found = []
    for function, run in itertools.groupby(assembly.loops(asm), lambda loop: loop.function):
        of_function = list(run)
        first = {loop.line: loop for loop in of_function}
        found += [_loop(first[lines[0]], function, counts, lines, core) for counts, lines in alike(of_function).items()]
    return found


def _loop(loop: Loop, function: str, counts: Counts, lines: Sequence[int], core: Core) -> InnerLoop:
    mix = {COLUMNS[name]: getattr(counts, name) for name in _MIX}
    tiles = sum(line.startswith("tdp") for line in loop.code)
    vectors = counts.fmas + counts.dots - tiles + counts.arithmetic + counts.conversions
    cycles = {
        "arithmetic": max(vectors / core.arithmetic, tiles * core.tile_cycles),
        "loads": (counts.loads + counts.broadcasts + core.embedded_loads * counts.embedded) / core.loads,
        "instructions": counts.instructions / core.instructions,
    }
    bound = max(cycles, key=lambda name: cycles[name])
    name = function.removeprefix("__tvm_ffi_").removesuffix("_compute_")
    registers = _registers(loop, counts)
    return InnerLoop(
        name, tuple(lines), mix, counts.instructions, cycles[bound], bound, registers, loop.code, loop.lines
    )


def _registers(loop: Loop, counts: Counts) -> str:
    """Registers of vectors that a loop uses, and its stores to the stack."""
    vectors = {number for line in loop.code for number in syntax_of(loop.code).register.findall(line)}
    tiles = {number for line in loop.code for number in re.findall(r"%tmm(\d)", line)}
    said = counted(len(vectors), "register") + (f", {counted(len(tiles), 'tile')}" if tiles else "")
    stores = counts.stack_stores
    return f"{said}, {counted(stores, 'store')} to the stack" if stores else said
