"""CPU strategy: elements of head_dim lie side by side in the lanes of a vector register. For any number of heads.

    qk_matmul    qk_rows x qk_tokens vectors of partial dot products in registers, one step for `lanes` elements of
                 head_dim; then the sums across the lanes, a whole group of tokens at a time
    softmax      along the tokens of a row
    pv_matmul    pv_rows x pv_dims outputs in registers, one step per token

Keys and values are read as they lie in a row of the cache. Register tiles come from cache_write: LLVM keeps a sum in a
register only where it lives in a small buffer of its own.
"""

from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from pa_compiler.schedules.sum_lanes import sum_lanes
from pa_compiler.tiling import Tiling, largest_divisor


def load_query(sch: Schedule, tiling: Tiling) -> None:
    """Rows of the query as vectors."""
    vectorize_dims(sch, tiling, "q_tile")


def load_keys(sch: Schedule, tiling: Tiling) -> None:
    """Convert whole rows of the cache."""
    _load_rows(sch, tiling, "load_keys_element")


def load_values(sch: Schedule, tiling: Tiling) -> None:
    """Convert whole rows of the cache."""
    _load_rows(sch, tiling, "load_values_element")


def qk_matmul(sch: Schedule, tiling: Tiling) -> None:
    """Partial dot products in registers, summed across their lanes a token group at a time."""
    scores = sch.get_sblock("scores")
    _, part_lane = sch.split(sch.get_loops(scores)[-1], [None, tiling.lanes])
    parts = sch.rfactor(part_lane, factor_axis=3)
    group, token, row, _ = sch.get_loops(scores)[-4:]
    sch.reorder(row, token)
    sch.compute_at(parts, group, preserve_unit_loops=True)
    sums = sch.cache_write(parts, 0, "global")
    lane, token, row, dim = sch.get_loops(parts)[-4:]
    token_outer, token = sch.split(token, [None, tiling.qk_tokens])
    row_outer, row = sch.split(row, [None, tiling.qk_rows])
    sch.reorder(token_outer, row_outer, dim, token, row, lane)
    in_registers(sch, sums, row_outer, token, row, lane)
    sch.decompose_reduction(parts, dim)
    _, token, _ = sch.get_loops(scores)[-3:]
    init = sch.decompose_reduction(scores, token)
    sch.vectorize(sch.get_loops(init)[-1])
    if tiling.lanes > 1:
        sch.tensorize(token, sum_lanes(tiling.lanes))
    fetch = sch.get_sblock("prefetch_keys")
    fetch_group, number = sch.get_loops(fetch)[-2:]
    sch.split(number, [int(sch.get(token_outer).extent), None])
    sch.merge(fetch_group, group)
    sch.merge(sch.get_loops(fetch)[-2], token_outer)


def softmax_prepare(sch: Schedule, tiling: Tiling) -> None:
    """Tokens in lanes; the maximum and the sum of a row first lane by lane."""
    for name in ("scaled", "probs"):
        sch.vectorize(sch.get_loops(sch.get_sblock(name))[-1])
    for name, axis in (("peak", 1), ("tile_sum", 2)):
        total = sch.get_sblock(name)
        parts = sch.rfactor(sch.get_loops(total)[-1], factor_axis=axis)
        *_, row, _ = around = sch.get_loops(total)
        sch.compute_at(parts, row, preserve_unit_loops=True)
        sums = sch.cache_write(parts, 0, "global")
        lane, group = sch.get_loops(parts)[len(around) - 1 :][:2]
        sch.reorder(group, lane)
        sch.vectorize(lane)
        sch.vectorize(sch.get_loops(sums)[-1])
        sch.decompose_reduction(parts, group)
        lane = sch.get_loops(total)[-1]
        sch.unroll(lane)
        sch.decompose_reduction(total, lane)


def pv_matmul(sch: Schedule, tiling: Tiling) -> None:
    """Outputs in registers over all whole token groups of the tile; the rest of the last one after that."""
    full = sch.get_sblock("full_groups")
    sums = sch.cache_write(full, 0, "global")
    group, token, row, dim = sch.get_loops(full)[-4:]
    row_outer, row = sch.split(row, [None, tiling.pv_rows])
    dim_outer, vector, lane = sch.split(dim, [None, tiling.pv_dims // tiling.lanes, tiling.lanes])
    sch.reorder(row_outer, dim_outer, group, token, row, vector, lane)
    sch.compute_at(sch.get_sblock("prefetch_values"), group, preserve_unit_loops=True)
    sch.reverse_compute_at(sums, dim_outer, preserve_unit_loops=True)
    sch.split(sch.get_loops(sums)[-1], [None, tiling.lanes])
    for loop in sch.get_loops(sums)[-3:-1]:
        sch.unroll(loop)
    sch.vectorize(sch.get_loops(sums)[-1])
    for loop in (token, row, vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.decompose_reduction(full, group)
    rest = sch.get_sblock("tile_acc")
    vectorize_dims(sch, tiling, "tile_acc")
    sch.decompose_reduction(rest, sch.get_loops(rest)[-4])


def online_update(sch: Schedule, tiling: Tiling) -> None:
    """Rows in lanes for their maxima and sums, head_dim in lanes for acc."""
    vectorize_rows(sch, "rescale", "new_sum", "row")
    vectorize_dims(sch, tiling, "acc")


def store_partial(sch: Schedule, tiling: Tiling) -> None:
    """Rows of acc as vectors."""
    vectorize_dims(sch, tiling, "store_acc")


def normalize(sch: Schedule, tiling: Tiling) -> None:
    """Rows of out as vectors."""
    vectorize_rows(sch, "factor")
    vectorize_dims(sch, tiling, "out")


STAGES: dict[str, Callable[[Schedule, Tiling], None]] = {
    "load_query": load_query,
    "load_keys": load_keys,
    "load_values": load_values,
    "qk_matmul": qk_matmul,
    "softmax_prepare": softmax_prepare,
    "pv_matmul": pv_matmul,
    "online_update": online_update,
    "store_partial": store_partial,
    "out": normalize,
}
"""How each stage is scheduled, by the name of its sblock."""


def vectorize_rows(sch: Schedule, *sblocks: str) -> None:
    """Vectorize the innermost loop, which is over rows."""
    for name in sblocks:
        sch.vectorize(sch.get_loops(sch.get_sblock(name))[-1])


def vectorize_dims(sch: Schedule, tiling: Tiling, *sblocks: str) -> None:
    """Vectorize the innermost loop, which is over head_dim."""
    for name in sblocks:
        _, lane = sch.split(sch.get_loops(sch.get_sblock(name))[-1], [None, tiling.lanes])
        sch.vectorize(lane)


def in_registers(sch: Schedule, sums: SBlockRV, outer: LoopRV, *tile: LoopRV) -> None:
    """Unroll the loops of a register tile, the last of them as a vector, and write its sums back below outer."""
    sch.reverse_compute_at(sums, outer, preserve_unit_loops=True)
    for loop in (*sch.get_loops(sums)[-len(tile) : -1], *tile[:-1]):
        sch.unroll(loop)
    sch.vectorize(sch.get_loops(sums)[-1])
    sch.vectorize(tile[-1])


def _load_rows(sch: Schedule, tiling: Tiling, sblock: str) -> None:
    """Read a cache row in vectors, unrolled so that its address is computed once for many."""
    dim = sch.get_loops(sch.get_sblock(sblock))[-1]
    vectors = int(sch.get(dim).extent) // tiling.lanes
    _, vector, lane = sch.split(dim, [None, largest_divisor(vectors, 32), tiling.lanes])
    sch.unroll(vector)
    sch.vectorize(lane)
