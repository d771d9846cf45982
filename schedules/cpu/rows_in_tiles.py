"""CPU strategy of bfloat16 in NHD and HND: matmuls by a matrix unit (AMX), of rows of tokens as they lie in the caches.

    qk_matmul    64 tokens x 16 rows of scores in four tile registers, one step for 16 pairs of head_dim; then turned
    pv_matmul    rows x up to 128 elements of value_dim in four tile registers, even ones and odd ones apart, one step
                 for 16 tokens
    the rest     as where tokens lie in the lanes of a vector register

A tile of keys, with 16 pairs of 16 tokens, is a left operand of the unit's products, and one of values a right one. The
others are the query, with its rows side by side, and the weights.
"""

from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from pa_compiler.kernels.ahead import KEYS, VALUES
from pa_compiler.schedules.cpu import head_dim_in_lanes, in_tile_registers, scales, tokens_in_tiles
from pa_compiler.schedules.fetch import fetch
from pa_compiler.schedules.intrinsics.tile_nests import COLUMNS, Registers, clear, load, multiply, store
from pa_compiler.schedules.intrinsics.transpose import transpose
from pa_compiler.schedules.intrinsics.turn_rows import turn_rows
from pa_compiler.tiles import VectorTiling

_PAIRS = 16
_OF_KEYS, _OF_VALUES = Registers(4, 5), Registers(4, 6)


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Scores of a token group in tile registers, one token in a row; then turned, with tokens in lanes."""
    scores = sch.get_sblock("scores")
    sums = sch.cache_write(scores, 0, "global")
    group, head, tile, token, row, pair = sch.get_loops(scores)[-6:]
    step, pair = sch.split(pair, [None, _PAIRS])
    sch.reorder(group, head, step, tile, token, row, pair)
    for copy in (sums, "turned_scores"):
        sch.reverse_compute_at(copy, head, preserve_unit_loops=True)
    token, row = sch.get_loops(sums)[-2:]
    stored, _ = sch.split(token, [None, COLUMNS])
    cleared = sch.decompose_reduction(scores, step)
    clear(sch, sch.get_loops(cleared)[-3])
    multiply(sch, tile, _OF_KEYS, int(sch.get(tile).extent))
    store(sch, stored)
    if tiling.prefetches:
        fetch(sch, KEYS, group, shares=[step, tile])
    token, row = sch.get_loops("turned_scores")[-2:]
    if tiling.row_tile == 1:
        sch.reorder(row, token)
        sch.vectorize(token)
    else:
        sch.tensorize(token, turn_rows(tiling.row_tile))


def split_probs(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes."""
    for name in ("even_weight", "odd_weight"):
        sch.vectorize(sch.get_loops(name)[-1])


def clear_sums(sch: Schedule, tiling: VectorTiling) -> None:
    """Of all elements of a pass in tile registers."""
    clear(sch, _tiles(sch, "no_sum"))


def whole_sum(sch: Schedule, tiling: VectorTiling) -> None:
    """Values from where they lie."""
    pass_, group, step = sch.get_loops("whole_sum")[-6:-3]
    tile = _tiles(sch, "whole_sum")
    multiply(sch, tile, _OF_VALUES, _row_tiles(sch, tile))
    if tiling.prefetches:
        fetch(sch, VALUES, group, passes=[pass_], shares=[step, tile])


def load_sums(sch: Schedule, tiling: VectorTiling) -> None:
    """Of a pass, as they were stored."""
    load(sch, _tiles(sch, "loaded_sum"))


def edge_group(sch: Schedule, tiling: VectorTiling) -> None:
    """Values from the copy."""
    sch.vectorize(sch.split(sch.get_loops("edge_value")[-1], [None, COLUMNS])[1])
    tile = _tiles(sch, "edge_sum")
    multiply(sch, tile, _OF_VALUES, _row_tiles(sch, tile))


def store_sums(sch: Schedule, tiling: VectorTiling) -> None:
    """Of all elements of a pass."""
    store(sch, _tiles(sch, "stored_sum"))


def _tiles(sch: Schedule, name: str) -> LoopRV:
    """The loop over tiles of columns, which one over tiles of rows is in: of loops over both, and of products pairs."""
    loops = sch.get_loops(name)
    row, word, *pair = loops[-3:] if name in ("whole_sum", "edge_sum") else loops[-2:]
    row_tile, row = sch.split(row, [None, COLUMNS])
    tile, word = sch.split(word, [None, COLUMNS])
    sch.reorder(tile, row_tile, row, word, *pair)
    return tile


def _row_tiles(sch: Schedule, tile: LoopRV) -> int:
    """Tiles of rows within a loop over tiles of columns."""
    return int(sch.get(tile).body.extent)


def element_sums(sch: Schedule, tiling: VectorTiling) -> None:
    """Words in lanes."""
    token = sch.get_loops("element_sum")[-2]
    for name in ("element_sum", "stored_element"):
        sch.vectorize(sch.split(sch.get_loops(name)[-1], [None, COLUMNS])[1])
    sch.decompose_reduction("element_sum", token)


def find_infinite(sch: Schedule, tiling: VectorTiling) -> None:
    """Words in lanes."""
    in_tile_registers.find_infinite(sch, tiling)


def fold(sch: Schedule, tiling: VectorTiling) -> None:
    """Even and odd elements brought in order by shuffles."""
    sch.transform_layout("in_order", ("write", 0), lambda i, r, d: (i, r, d // 2, d % 2))
    *_, parity, word = sch.get_loops("in_order")
    outer, word = sch.split(word, [None, COLUMNS])
    sch.reorder(outer, parity, word)
    sch.tensorize(parity, transpose(2, COLUMNS, "float32"))
    head_dim_in_lanes.fold(sch, tiling)


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    name: apply
    for name, apply in head_dim_in_lanes.IN_PLACE.items()
    if name not in ("columns", "visible_rows", "pv_matmul", "pv_update", "pair_probs", *scales.STAGES)
} | {
    "qk_matmul": qk_matmul,
    "softmax_prepare": tokens_in_tiles.softmax_prepare,
    "split_probs": split_probs,
    "clear_sums": clear_sums,
    "load_sums": load_sums,
    "whole_sum": whole_sum,
    "edge_group": edge_group,
    "store_sums": store_sums,
    "find_infinite": find_infinite,
    "element_sums": element_sums,
    "fold": fold,
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = head_dim_in_lanes.SCALAR | {"pv_update": "around stages", "finite_sums": "around stages"}
"""The sblocks that run as they are written, and why."""
