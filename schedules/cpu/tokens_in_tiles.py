"""CPU strategy of packed bfloat16: matmuls by a matrix unit (AMX), of keys and values as they lie in the caches.

    qk_matmul    rows x 64 tokens of scores in four tile registers, one step for 16 pairs of head_dim
    pv_matmul    rows x up to 64 elements of value_dim in as many, one step for a row of pairs of tokens of one block
    the rest     as where tokens lie in the lanes of a vector register

A tile of packed keys has an element pair of 16 tokens in each of its rows, and one of packed values a token pair: both
are right operands of the unit's products. The left ones are the query and the weights.
"""

from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from pa_compiler.kernels.ahead import KEYS, VALUES
from pa_compiler.schedules.cpu import head_dim_in_lanes, in_tile_registers, scales, tokens_in_lanes
from pa_compiler.schedules.fetch import fetch
from pa_compiler.schedules.intrinsics.add_lanes import ROWS, add_lanes
from pa_compiler.schedules.intrinsics.max_lanes import max_lanes
from pa_compiler.schedules.intrinsics.pair_lanes import round_lanes
from pa_compiler.schedules.intrinsics.tile_nests import COLUMNS, Registers, clear, multiply, store
from pa_compiler.tiles import VectorTiling

_PAIRS = 16
_OF_KEYS, _OF_VALUES = Registers(4, 5), Registers(6, 7)


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Scores of a token group in tile registers."""
    scores = sch.get_sblock("scores")
    sums = sch.cache_write(scores, 0, "global")
    group, token, row, pair = sch.get_loops(scores)[-4:]
    tile, column = sch.split(token, [None, COLUMNS])
    step, pair = sch.split(pair, [None, _PAIRS])
    sch.reorder(group, step, tile, row, column, pair)
    sch.reverse_compute_at(sums, group, preserve_unit_loops=True)
    row, token = sch.get_loops(sums)[-2:]
    stored, column = sch.split(token, [None, COLUMNS])
    sch.reorder(stored, row, column)
    cleared = sch.decompose_reduction(scores, step)
    clear(sch, sch.get_loops(cleared)[-3])
    multiply(sch, tile, _OF_KEYS)
    store(sch, stored)
    fetch(sch, KEYS, group, shares=[step, tile])


def softmax_prepare(sch: Schedule, tiling: VectorTiling) -> None:
    """As where tokens lie in lanes, with the maxima of all rows together."""
    head_dim_in_lanes.softmax_prepare(sch, tiling, _of_rows)
    if tiling.many_tokens:
        token = sch.get_loops("pairs")[-1]
        sch.tensorize(token, round_lanes(int(sch.get(token).extent)))


def pair_probs(sch: Schedule, tiling: VectorTiling) -> None:
    """As where tokens lie in lanes, with the sums of sixteen rows together."""
    head_dim_in_lanes.pair_probs(sch, tiling, _of_rows)


def full_scores(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of the scores that all rows see."""
    sch.vectorize(sch.get_loops("full_scaled")[-1])
    _of_rows(sch, "full_peak", 1, 0)


def _of_rows(sch: Schedule, name: str, axis: int, lanes: int) -> None:
    """What is made of a row's tokens first lane by lane, then of the lanes of all rows together."""
    total = sch.get_sblock(name)
    rows, is_sum = int(sch.get(sch.get_loops(total)[-3]).extent), name == "tile_sum"
    lanes = lanes or COLUMNS
    if rows == 1 or (is_sum and rows != ROWS):
        head_dim_in_lanes.by_lanes(sch, name, axis, lanes)
        return
    _, lane = sch.split(sch.get_loops(total)[-1], [None, lanes])
    parts = sch.rfactor(lane, factor_axis=axis)
    sums = sch.cache_write(parts, 0, "global")
    row, group, vector, lane = sch.get_loops(parts)[-4:]
    sch.vectorize(lane)
    sch.unroll(vector)
    sch.reverse_compute_at(sums, row)
    sch.vectorize(sch.get_loops(sums)[-1])
    sch.decompose_reduction(parts, group)
    row = sch.get_loops(total)[-2]
    sch.vectorize(sch.get_loops(sch.decompose_reduction(total, row))[-1])
    _, row = sch.split(row, [None, rows])  # the loop that stays is what rfactor of other sblocks steps over
    sch.tensorize(row, add_lanes(lanes) if is_sum else max_lanes(rows))


def _clear_sums(sch: Schedule, of: str) -> None:
    clear(sch, _tiles(sch, f"{of}no_sum"))


def _whole_sum(sch: Schedule, of: str) -> None:
    pass_, group, step = sch.get_loops(f"{of}whole_sum")[-6:-3]
    tile = _tiles(sch, f"{of}whole_sum")
    multiply(sch, tile, _OF_VALUES)
    if not of:
        fetch(sch, VALUES, group, passes=[pass_], shares=[step, tile])


def _edge_group(sch: Schedule, of: str) -> None:
    sch.vectorize(sch.split(sch.get_loops(f"{of}edge_value")[-1], [None, COLUMNS])[1])
    multiply(sch, _tiles(sch, f"{of}edge_sum"), _OF_VALUES)


def _store_sums(sch: Schedule, of: str) -> None:
    store(sch, _tiles(sch, f"{of}stored_sum"))


def _tiles(sch: Schedule, name: str) -> LoopRV:
    """The loop over tiles of columns: of loops over rows and columns, and of products over pairs."""
    loops = sch.get_loops(name)
    row, dim, *pair = loops[-3:] if name.endswith(("whole_sum", "edge_sum")) else loops[-2:]
    tile, column = sch.split(dim, [None, COLUMNS])
    sch.reorder(tile, row, column, *pair)
    return tile


_OF_SUMS = {
    "clear_sums": _clear_sums,
    "whole_sum": _whole_sum,
    "edge_group": _edge_group,
    "store_sums": _store_sums,
}


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    name: apply
    for name, apply in tokens_in_lanes.STAGES.items()
    if name not in ("columns", "visible_rows", "pv_matmul", "pv_update", *scales.STAGES)
} | {
    "qk_matmul": qk_matmul,
    "softmax_prepare": softmax_prepare,
    "pair_probs": pair_probs,
    "full_scores": full_scores,
    "find_infinite": in_tile_registers.find_infinite,
    **{
        of + name: lambda sch, _, apply=apply, of=of: apply(sch, of)
        for of in ("", "row_")
        for name, apply in _OF_SUMS.items()
    },
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = tokens_in_lanes.SCALAR | {
    "pv_update": "around stages",
    "row_apart": "around stages",
    "row_of_acc": "a row of outputs where values are infinite or NaN",
}
"""The sblocks that run as they are written, and why."""
