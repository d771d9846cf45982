"""CPU strategy of packed bfloat16: matmuls by a matrix unit (AMX), of keys and values as they lie in the caches.

    qk_matmul    rows x 64 tokens of scores in four tile registers, one step for 16 pairs of head_dim
    pv_matmul    rows x up to 64 elements of value_dim in as many, one step for a row of pairs of tokens of one block
    the rest     as where tokens lie in the lanes of a vector register

A tile of packed keys has an element pair of 16 tokens in each of its rows, and one of packed values a token pair: both
are right operands of the unit's products. The left ones are the query and the weights.
"""

from collections.abc import Callable

from tvm.s_tir import Schedule

from pa_compiler.kernels.ahead import KEYS, VALUES
from pa_compiler.schedules.cpu import tokens_in_lanes
from pa_compiler.schedules.cpu.head_dim_in_lanes import vectorize_in_order
from pa_compiler.schedules.fetch import fetch
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
    fetch(sch, KEYS, group, shares=[step])


def clear_sums(sch: Schedule, tiling: VectorTiling) -> None:
    """In tile registers."""
    row, dim = sch.get_loops("no_sum")[-2:]
    tile, column = sch.split(dim, [None, COLUMNS])
    sch.reorder(tile, row, column)
    clear(sch, tile)


def whole_sum(sch: Schedule, tiling: VectorTiling) -> None:
    """Of values in the cache."""
    pass_, group = sch.get_loops("whole_sum")[-6:-4]
    _products(sch, "whole_sum")
    fetch(sch, VALUES, group, passes=[pass_])


def edge_group(sch: Schedule, tiling: VectorTiling) -> None:
    """Of values in the copy, whose rows are made as vectors."""
    sch.vectorize(sch.split(sch.get_loops("edge_value")[-1], [None, COLUMNS])[1])
    _products(sch, "edge_sum")


def _products(sch: Schedule, name: str) -> None:
    row, dim, pair = sch.get_loops(name)[-3:]
    tile, column = sch.split(dim, [None, COLUMNS])
    sch.reorder(tile, row, column, pair)
    multiply(sch, tile, _OF_VALUES)


def store_sums(sch: Schedule, tiling: VectorTiling) -> None:
    """From tile registers."""
    row, dim = sch.get_loops("stored_sum")[-2:]
    tile, column = sch.split(dim, [None, COLUMNS])
    sch.reorder(tile, row, column)
    store(sch, tile)


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    name: apply for name, apply in tokens_in_lanes.STAGES.items() if name not in ("pv_matmul", "pv_update")
} | {
    "qk_matmul": qk_matmul,
    "clear_sums": clear_sums,
    "whole_sum": whole_sum,
    "edge_group": edge_group,
    "store_sums": store_sums,
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = tokens_in_lanes.SCALAR | {
    "pv_update": "around stages",
    "edge_group": "around stages",
}
"""The sblocks that run as they are written, and why."""
