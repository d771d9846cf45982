"""Schedules: how the kernels run on a target. One file per strategy; it changes loops and the order of sums, no more.

Each file has STAGES, which says for the name of an sblock what to do with it, and SCALAR, which says of the sblocks
that run as they are written why they may. An sblock that is in neither must lie within a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

from tvm import IRModule
from tvm.s_tir import SBlock, Schedule
from tvm.tirx import PrimFunc, Stmt

from pa_compiler.schedules.cpu import (
    append_kv,
    blocks_in_lanes,
    head_dim_in_lanes,
    heads_in_lanes,
    in_tile_registers,
    merge_parts,
    rows_in_tiles,
    tokens_in_lanes,
    tokens_in_tiles,
)
from pa_compiler.schedules.cuda import threads as cuda_threads
from pa_compiler.statements import parts
from pa_compiler.tiles import LLVM_LEVEL, Tiling, VectorTiling

_STRATEGIES = {
    "heads_in_lanes": heads_in_lanes,
    "blocks_in_lanes": blocks_in_lanes,
    "in_tile_registers": in_tile_registers,
    "head_dim_in_lanes": head_dim_in_lanes,
    "tokens_in_lanes": tokens_in_lanes,
    "tokens_in_tiles": tokens_in_tiles,
    "rows_in_tiles": rows_in_tiles,
    "cuda_threads": cuda_threads,
}


def schedule(mod: IRModule, tiling: Tiling) -> IRModule:
    """The module with every PrimFunc scheduled, as in the schedule of `scheduled`."""
    return scheduled(mod, tiling).mod


def scheduled(mod: IRModule, tiling: Tiling) -> Schedule:
    """The schedule of a module with every PrimFunc scheduled. The module given may be changed: use it no more.

    Raises:
        ValueError: an sblock that neither is a stage of the strategy, nor lies within one, nor is listed as scalar.
    """
    of = {variable: _strategy_of(variable.name_hint, tiling) for variable in mod.functions}
    sch = Schedule(IRModule({variable: _for_llvm(mod[variable], tiles) for variable, (_, tiles) in of.items()}))
    for variable in sch.mod.get_global_vars():
        strategy, tiles = _strategy_of(variable.name_hint, tiling)
        sch.work_on(variable.name_hint)
        for apply in _stages(sch, variable.name_hint, strategy):
            apply(sch, tiles)
    return sch


def _strategy_of(function: str, tiling: Tiling) -> tuple[str, Tiling]:
    """How a PrimFunc is scheduled: partial results are merged in one way, whatever the strategy."""
    tiling = tiling.of_kernel(function)
    if function.startswith("merge_") and isinstance(tiling, VectorTiling):
        return "head_dim_in_lanes", tiling.of_merge()
    return tiling.strategy, tiling


def _for_llvm(function: PrimFunc, tiling: Tiling) -> PrimFunc:
    """With what LLVM is told of it: nothing, where it optimizes as it does by default."""
    return function if tiling.llvm_level == 3 else function.with_attr(LLVM_LEVEL, tiling.llvm_level)


def _stages(sch: Schedule, function: str, strategy: str) -> list[Callable[[Schedule, Tiling], None]]:
    """What a strategy does to the PrimFunc that a schedule works on: for each stage that is there, in STAGES' order."""
    stages = _STRATEGIES[strategy].STAGES | append_kv.STAGES | merge_parts.STAGES
    scalar = _STRATEGIES[strategy].SCALAR | merge_parts.SCALAR
    (root,) = _within(sch.mod[function].body)
    sblocks = root.within
    if strays := list(_strays(sblocks, stages.keys() | scalar.keys())):
        raise ValueError(
            f"sblock: expected a stage of strategy {strategy}, one within a stage, or one that its SCALAR names, got "
            f"{', '.join(strays)} of PrimFunc {function}"
        )
    present = _names(sblocks)
    return [apply for stage, apply in stages.items() if stage in present]


class _Sblock(NamedTuple):
    name: str
    within: list[_Sblock]


def _within(statement: Stmt) -> list[_Sblock]:
    """The sblocks in a statement, but for those in another."""
    if isinstance(statement, SBlock):
        return [_Sblock(statement.name_hint, [each for part in parts(statement) for each in _within(part)])]
    return [each for part in parts(statement) for each in _within(part)]


def _names(sblocks: list[_Sblock]) -> set[str]:
    return {sblock.name for sblock in sblocks}.union(*(_names(sblock.within) for sblock in sblocks))


def _strays(sblocks: list[_Sblock], listed: Set[str]) -> Iterator[str]:
    """The names that neither are listed nor lie within a listed sblock as its own.

    Its own are all that it has, none of them listed, and with none within. Otherwise it is a loop around stages.
    """
    for name, within in sblocks:
        if name not in listed:
            yield name
        elif any(inner.within or inner.name in listed for inner in within):
            yield from _strays(within, listed)
