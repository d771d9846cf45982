"""CPU strategy of attend: matmuls by a matrix unit (AMX), everything else as where rows lie in the lanes of a vector.

    qk_matmul    64 tokens x 16 rows of scores in four tile registers, one step for 16 pairs of head_dim
    pv_matmul    64 elements of value_dim x 16 rows of outputs in four tile registers, one step for 16 pairs of tokens

The left operands are the copies of a tile of keys, as they lie in rows of tokens, and of values, transposed. The right
ones are the query and the weights, whose rows lie side by side for the softmax.
"""

import functools
from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from pa_compiler.kernels.ahead import EARLY_KEYS, KEYS, VALUES
from pa_compiler.schedules.cpu import functions, heads_in_lanes, scales
from pa_compiler.schedules.cpu.head_dim_in_lanes import vectorize_rows
from pa_compiler.schedules.cpu.vertical import four_maxima, rows_last, vertical
from pa_compiler.schedules.fetch import fetch
from pa_compiler.schedules.intrinsics.tile_products import SCOPE, TILE, TILES, add_tiles, clear_tiles, store_tiles
from pa_compiler.schedules.intrinsics.transpose import transpose
from pa_compiler.schedules.intrinsics.turn_pairs import turn_pairs
from pa_compiler.tiles import VectorTiling


def load_keys(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of the cache as vectors; packed, where tokens lie side by side, they are turned."""
    if _is_packed(tiling):
        _load_turned(sch, "load_keys_element", 0)
    else:
        _, lane = sch.split(sch.get_loops("load_keys_element")[-1], [None, TILE])
        sch.vectorize(lane)


def load_values(sch: Schedule, tiling: VectorTiling) -> None:
    """Turned: pairs of tokens, as they lie packed, or as their rows have them."""
    if _is_packed(tiling):
        sch.transform_layout("load_values_element", ("write", 0), lambda pair, dim: (dim, pair))
        _load_turned(sch, "load_values_element", 1)
        return
    rows_last(sch, "load_values_element")
    pair, dim = sch.get_loops("load_values_element")[-2:]
    pair_outer, pair = sch.split(pair, [None, TILE])
    dim_outer, dim = sch.split(dim, [None, 2 * TILE])
    sch.reorder(pair_outer, dim_outer, pair, dim)
    sch.compute_at("load_rows_element", pair_outer, preserve_unit_loops=True)
    _, lane = sch.split(sch.get_loops("load_rows_element")[-1], [None, TILE])
    sch.vectorize(lane)
    sch.tensorize(pair, turn_pairs())
    group = sch.get_loops("load_rows_element")[0]
    fetch(sch, EARLY_KEYS, group, shares=[pair_outer, dim_outer])


def _is_packed(tiling: VectorTiling) -> bool:
    """Whether a word of the values has an element of two tokens."""
    return tiling.values.halves == 1


def _load_turned(sch: Schedule, name: str, first: int) -> None:
    """Words that lie side by side in the cache along the first axis of a copy, which is the sblock's nth loop."""
    sch.blockize(sch.get_loops(name)[-2])  # a token group: how many there are is known at run time only
    turned = sch.cache_write(name, 0, "global")
    sch.transform_layout(name, ("write", 0), lambda i, j: (i // TILE, j, i % TILE))
    sch.transform_block_layout(turned, lambda i, j: (j, i))
    outer, tile = zip(*(sch.split(loop, [None, TILE]) for loop in sch.get_loops(turned)[-2:]), strict=True)
    sch.reorder(*outer, *tile)
    sch.compute_at(name, outer[-1], preserve_unit_loops=True)
    sch.tensorize(tile[0], transpose(TILE, TILE, "int32"))
    loops = sch.get_loops(name)[-2:]
    lane = loops.pop(first)
    sch.reorder(*loops, lane)
    sch.unroll(*loops)
    sch.vectorize(lane)


def find_infinite(sch: Schedule, tiling: VectorTiling) -> None:
    """Token pairs in lanes."""
    lane, *around = sch.get_loops("largest")[-4:]
    sch.reorder(*around, lane)
    sch.vectorize(lane)
    sch.decompose_reduction("largest", around[0])
    (lane,) = sch.get_loops("infinite")[-1:]
    sch.decompose_reduction("infinite", lane)


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Scores of a part of a token group in tile registers."""
    rows_last(sch, "scores", "pairs")
    _scores(sch, "scores")


def few_qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of a part of the rows; qk_matmul has laid out what is written."""
    _scores(sch, "few_scores")


def _scores(sch: Schedule, name: str) -> None:
    scores = sch.get_sblock(name)
    across = _across(sch, scores, 2)
    sums = sch.cache_write(scores, 0, SCOPE)
    group, token, row, dim = sch.get_loops(scores)[-4:]
    part, token = sch.split(token, [None, TILES // across * TILE])
    dim, step = sch.split(dim, [None, TILE])
    sch.reorder(group, part, dim, token, row, step)
    sch.reverse_compute_at(sums, part, preserve_unit_loops=True)
    _in_tile_registers(sch, name, sums, dim, token, across)
    fetch(sch, KEYS, group, shares=[part, dim])


def _across(sch: Schedule, block: SBlockRV, row: int) -> int:
    """Tile registers side by side that have the sums of all rows, which are the row-th last loop but one."""
    return int(sch.get(sch.get_loops(block)[-row]).extent) // TILE


def _in_tile_registers(sch: Schedule, name: str, sums: SBlockRV, steps: LoopRV, block: LoopRV, across: int) -> None:
    """A block of sums: cleared before the loop over steps, added to by the loops from block on, and at last stored."""
    cleared = sch.decompose_reduction(name, steps)
    for loop, intrinsic in (
        (sch.get_loops(cleared)[-2], clear_tiles(across)),
        (block, add_tiles(across)),
        (sch.get_loops(sums)[-2], store_tiles(across)),
    ):
        sch.tensorize(loop, intrinsic)


def seen_scores(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical."""
    steps = functions.score_steps(sch, tiling)
    rows_last(sch, *steps, "scaled")
    for name in (*steps, "scaled"):
        row, group, token = sch.get_loops(sch.get_sblock(name))[-3:]
        sch.reorder(group, token, row)
        sch.vectorize(row)


def empty_rest(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical."""
    vectorize_rows(sch, "empty_row_of_rest")


def full_scores(sch: Schedule, tiling: VectorTiling, of: str = "") -> None:
    """Vertical."""
    four_maxima(sch, f"{of}full_peak")


def maxima(sch: Schedule, tiling: VectorTiling, of: str = "") -> None:
    """Vertical."""
    four_maxima(sch, f"{of}peak")
    vectorize_rows(sch, f"{of}tile_max", f"{of}room")


def full_weights(sch: Schedule, tiling: VectorTiling, of: str = "") -> None:
    """Of two tokens from scores to the word of their weights in registers."""
    weights(sch, tiling, f"{of}full_")


def weights(sch: Schedule, tiling: VectorTiling, of: str = "") -> None:
    """The same; qk_matmul has laid out what is written."""
    rows_last(sch, f"{of}probs")
    row, part, group, pair = sch.get_loops(f"{of}pairs")[-4:]
    sch.reorder(part, group, pair, row)
    sch.compute_at(f"{of}probs", pair, preserve_unit_loops=True)
    sch.reverse_compute_at(f"{of}part_sum", pair, preserve_unit_loops=True)
    token, lane = sch.get_loops(f"{of}probs")[-2:]
    sch.unroll(token)
    for each in (lane, row, sch.get_loops(f"{of}part_sum")[-1]):
        sch.vectorize(each)
    sch.decompose_reduction(f"{of}part_sum", group)


def weight_sum(sch: Schedule, tiling: VectorTiling, of: str = "") -> None:
    """Vertical."""
    row, part = sch.get_loops(f"{of}tile_sum")[-2:]
    sch.reorder(part, row)
    sch.vectorize(row)
    sch.vectorize(sch.get_loops(sch.decompose_reduction(f"{of}tile_sum", part))[-1])


def whole_products(sch: Schedule, tiling: VectorTiling) -> None:
    """Outputs in tile registers, folded as soon as they leave them."""
    rows_last(sch, "acc")
    _folded_products(sch, tiling, "")


def few_whole_products(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of a part of the rows; whole_products has laid out what is written."""
    _folded_products(sch, tiling, "few_")


def _folded_products(sch: Schedule, tiling: VectorTiling, of: str) -> None:
    group, dim = _products(sch, tiling, f"{of}whole")
    tile, row, acc_dim = sch.get_loops(f"{of}acc")[-3:]
    outer, inner = sch.split(acc_dim, [int(sch.get(dim).extent), None])
    sch.reorder(outer, tile, inner, row)
    sch.vectorize(row)
    dim = sch.merge(dim, outer)
    fetch(sch, VALUES, group, passes=[dim])


def apart_products(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of the values that one row sees."""
    _products(sch, tiling, "apart")


def _products(sch: Schedule, tiling: VectorTiling, of: str) -> tuple[LoopRV, LoopRV]:
    block = sch.get_sblock(f"{of}_sum")
    rows_last(sch, block)
    across = _across(sch, block, 2)
    sums = sch.cache_write(block, 0, SCOPE)
    group, dim, row, token = sch.get_loops(block)[-4:]
    dim_outer, dim = sch.split(dim, [None, TILES // across * TILE])
    token_outer, token = sch.split(token, [None, TILE])
    sch.reorder(dim_outer, group, token_outer, dim, row, token)
    sch.reverse_compute_at(sums, dim_outer, preserve_unit_loops=True)
    _in_tile_registers(sch, f"{of}_sum", sums, group, dim, across)
    return group, dim_outer


def row_values(sch: Schedule, tiling: VectorTiling) -> None:
    """As the copy of values lies."""
    rows_last(sch, "row_value")


def apart_fold(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical; whole_products has laid out what is written."""
    vertical(sch, "apart_acc")


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = (
    {
        name: apply
        for name, apply in heads_in_lanes.STAGES.items()
        if name not in ("few_pv_update", "pv_update", "pair_probs", "softmax_prepare", *scales.STAGES)
    }
    | {
        "seen_scores": seen_scores,
        "load_keys": load_keys,
        "load_values": load_values,
        "find_infinite": find_infinite,
        "qk_matmul": qk_matmul,
        "few_qk_matmul": few_qk_matmul,
        "whole_products": whole_products,
        "few_whole_products": few_whole_products,
        "row_values": row_values,
        "apart_products": apart_products,
        "apart_fold": apart_fold,
        "empty_rest": empty_rest,
        "full_scores": full_scores,
        "maxima": maxima,
        "full_weights": full_weights,
        "weights": weights,
        "weight_sum": weight_sum,
    }
    | {
        f"few_{stage.__name__}": functools.partial(stage, of="few_")
        for stage in (full_scores, maxima, full_weights, weights, weight_sum)
    }
)
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = {name: why for name, why in heads_in_lanes.SCALAR.items() if name not in STAGES} | {
    EARLY_KEYS: "taken out again",
    "pv_update": "around stages",
    "row_apart": "around stages",
    "unused_value": "half of some words, at the end of a sequence",
    "row_of_acc": "a row of outputs where values are infinite or NaN",
}
"""The sblocks that run as they are written, and why."""
