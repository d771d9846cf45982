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

from pa_compiler.kernels.ahead import KEYS, VALUES
from pa_compiler.schedules.cpu import fours, functions, integers, scales
from pa_compiler.schedules.cpu.by_element import read_words
from pa_compiler.schedules.cpu.by_lanes import by_lanes
from pa_compiler.schedules.fetch import fetch
from pa_compiler.schedules.intrinsics.pair_lanes import pair_lanes
from pa_compiler.schedules.intrinsics.sum_lanes import sum_lanes
from pa_compiler.schedules.intrinsics.transpose import turn
from pa_compiler.tiles import VectorTiling, largest_divisor

Reduce = Callable[[Schedule, str, int, int], None]
_MAX_ROW_LANES = 256
"""Rows of one vector, at most: LLVM takes it apart in a time that grows with it, and TVM has none of 32768 lanes."""


def load_query(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of the query as vectors; pairs are taken apart in registers."""
    if tiling.keys.terms == 4:
        halves = sch.cache_write("q_tile", 0, "global")
        evens_first(sch, tiling.qk_lanes, tiling.keys.halves, halves)
    if tiling.keys.integers:
        integers.load_query(sch, tiling)
    if tiling.keys.terms > 1:
        return
    if tiling.keys.halves == 1:
        sch.vectorize(sch.split(sch.get_loops("q_tile")[-1], [None, tiling.qk_lanes])[1])
        return
    lanes, pair = tiling.qk_lanes, tiling.keys.halves
    evens = sch.cache_write("q_tile", 0, "global")
    evens_first(sch, lanes, pair, evens)
    sch.transform_block_layout(
        evens, lambda tile, row, dim: (tile, row, dim // (lanes * pair), dim // pair % lanes, dim % pair)
    )
    sch.compute_at("q_tile", sch.get_loops(evens)[-3], preserve_unit_loops=True)
    sch.vectorize(sch.get_loops("q_tile")[-1])
    sch.transform_layout("q_tile", ("write", 0), lambda *i: (*i[:-1], i[-1] // pair, i[-1] % pair))
    turn(sch, evens, 4, 2)


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Partial dot products in registers, summed across their lanes a token group at a time."""
    scores = sch.get_sblock("scores")
    _, part_lane, _ = sch.split(sch.get_loops(scores)[-1], [None, tiling.qk_lanes, tiling.keys.halves])
    parts = sch.rfactor(part_lane, factor_axis=3)
    tile, group, token, row, _ = sch.get_loops(scores)[-5:]
    if tiling.sweep == "tokens":
        sch.reorder(group, tile)
        group = tile
    sch.reorder(row, token)
    sch.compute_at(parts, group, preserve_unit_loops=True)
    sums = sch.cache_write(parts, 0, "global")
    lane, token, _, row, dim, half = sch.get_loops(parts)[-6:]
    token_outer, token = sch.split(token, [None, tiling.qk_tokens])
    row_outer, row = sch.split(row, [None, tiling.qk_rows])
    # with several rows a key's element stays in its register for all of them; with one, both elements of a word do
    inner = (half, row, token) if tiling.qk_rows > 1 else (row, token, half)
    # LLVM copies a short loop over codes for all tokens of a group, whose sums are in memory then
    steps = largest_divisor(int(sch.get(dim).extent), 4 if tiling.keys.word_dtype == "int8" else 1)
    dim, *step = sch.split(dim, [None, steps]) if steps > 1 else [dim]
    sch.reorder(token_outer, row_outer, dim, *step, *inner, lane)
    for loop in (*step, half):
        sch.unroll(loop)
    in_registers(sch, sums, row_outer, row, token, lane)
    sch.decompose_reduction(parts, dim)
    _, token, _ = sch.get_loops(scores)[-3:]
    sch.vectorize(sch.get_loops(sch.decompose_reduction(scores, token))[-1])
    if tiling.qk_lanes > 1:
        sch.tensorize(token, sum_lanes(tiling.qk_lanes, tiling.keys.sum_dtype))
    if tiling.prefetches:
        fetch(sch, KEYS, group, shares=[token_outer])


def softmax_prepare(sch: Schedule, tiling: VectorTiling, reduce: Reduce | None = None) -> None:
    """Tokens in lanes; the maximum and the sum of a row first lane by lane, as by_lanes or `reduce` has it."""
    reduce = reduce or by_lanes
    exact = ("exact",) if tiling.rounds_weights and not tiling.many_tokens else ()
    for name in (*functions.score_steps(sch, tiling), "scaled", *exact, "probs"):
        sch.vectorize(sch.get_loops(name)[-1])
    reduce(sch, "peak", 1, 0)
    if tiling.many_tokens or not tiling.pairs_weights:
        reduce(sch, "tile_sum", 2, tiling.weight_sums // (tiling.values.terms if tiling.pairs_weights else 1))


def pair_probs(sch: Schedule, tiling: VectorTiling, reduce: Reduce | None = None) -> None:
    """Pairs of tokens in lanes; their sums as in softmax_prepare."""
    token = sch.get_loops("pairs")[-1]
    sch.tensorize(token, pair_lanes(int(sch.get(token).extent)))
    if tiling.pairs_weights:
        (reduce or by_lanes)(sch, "tile_sum", 2, tiling.weight_sums // 2)


def pv_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Outputs in registers over all whole token groups of the tile, then the rest of the last one."""
    evens_first(sch, tiling.pv_lanes, tiling.values.halves, "full_groups", "tile_acc")
    sch.merge(_sum_tile(sch, tiling, "full_groups"), _sum_tile(sch, tiling, "tile_acc"))


def pv_update(sch: Schedule, tiling: VectorTiling) -> None:
    """Outputs in registers over all whole token groups of the tile, then over the rest of the last one, then folded."""
    evens_first(sch, tiling.pv_lanes, tiling.values.halves, "full_groups", "tile_acc")
    full = sch.get_sblock("full_groups")
    passes = [_fold_tile(sch, tiling), _sum_tile(sch, tiling, "tile_acc")]
    if tiling.sweep and not tiling.copy_values:
        _sum_groups(sch, tiling, full)
    else:
        passes.append(_sum_tile(sch, tiling, "full_groups"))
    sch.merge(*reversed(passes))
    if tiling.prefetches:
        _, *around, group = sch.get_loops(full)[:4]
        fetch(sch, VALUES, group, passes=around)


def _sum_tile(sch: Schedule, tiling: VectorTiling, sblock: str) -> LoopRV:
    """Sums of pv_rows x pv_dims outputs at a time over the tokens; the loop over these tiles.

    Elements of values are read by all rows before the next ones are, while they are in the first-level cache.
    """
    _, *tokens, row, dim = sch.get_loops(sblock)
    row_outer, row = sch.split(row, [None, tiling.pv_rows])
    dim_outer, vector, lane, half = _split_dims(sch, tiling, dim)
    sch.reorder(dim_outer, row_outer, *tokens, row, vector, half, lane)
    for loop in (*tokens[1:], vector, half, row):
        sch.unroll(loop)
    sch.vectorize(lane)
    if tiling.by_element and tiling.values.terms == 2 and tokens[1:]:
        read_words(sch, sch.get_sblock(sblock), tokens[0])
    sch.decompose_reduction(sblock, tokens[0])
    return row_outer


def _fold_tile(sch: Schedule, tiling: VectorTiling) -> LoopRV:
    """The same tiles of acc. From here on pairs are in order."""
    row, dim = sch.get_loops("acc")[-2:]
    row_outer, row = sch.split(row, [None, tiling.pv_rows])
    dim_outer, dim = sch.split(dim, [None, tiling.pv_dims])
    vector, lane = sch.split(dim, [None, tiling.pv_lanes * tiling.values.halves])
    sch.reorder(dim_outer, row_outer, row, vector, lane)
    if tiling.values.halves > 1:
        in_order = sch.cache_read("acc", "tile_acc", "global")
        sch.transform_layout(in_order, ("write", 0), lambda *i: (*i[:-3], i[-3] * tiling.pv_lanes + i[-1], i[-2]))
        sch.compute_at(in_order, vector, preserve_unit_loops=True)
        turn(sch, in_order, 2, 4)
    sch.unroll(row)
    sch.unroll(vector)
    sch.vectorize(lane)
    return row_outer


def _sum_groups(sch: Schedule, tiling: VectorTiling, full: SBlockRV) -> None:
    """Outputs in registers over some tokens of a group, and then added to what there is of them in memory.

    All of a group; or, packed, where tokens lie side by side, one or a pair of them from each of a group's places.
    """
    group, token = sch.get_loops(full)[-4:-2]
    if tiling.group_places > 1:
        place, token, pair = sch.split(token, [tiling.group_places, None, tiling.values.word])
        sch.reorder(token, place, pair)
        group, _ = sch.fuse(group, token), sch.fuse(place, pair)
    sums = sch.rfactor(group, factor_axis=0)
    tile, group, row, dim = sch.get_loops(full)[-4:]
    row_outer, row = sch.split(row, [None, tiling.pv_rows])
    dim_outer, *added = _split_dims(sch, tiling, dim)
    sch.reorder(*((group, tile) if tiling.sweep == "tokens" else (tile, group)), row_outer, dim_outer, row)
    sch.compute_at(sums, dim_outer, preserve_unit_loops=True)
    token, _, summed_row, dim = sch.get_loops(sums)[-4:]
    _, *summed = _split_dims(sch, tiling, dim)
    for (vector, lane, half), each_row, each_token in ((added, row, []), (summed, summed_row, [token])):
        sch.reorder(*each_token, each_row, vector, half, lane)
        for loop in (*each_token, vector, half, each_row):
            sch.unroll(loop)
        sch.vectorize(lane)
    sch.decompose_reduction(sums, token)
    sch.decompose_reduction(full, group)


def _split_dims(sch: Schedule, tiling: VectorTiling, dim: LoopRV) -> list[LoopRV]:
    """The loop over head_dim as tiles of vectors of lanes of pairs."""
    lanes, halves = tiling.pv_lanes, tiling.values.halves
    return sch.split(dim, [None, tiling.pv_dims // (lanes * halves), lanes, halves])


def rescale(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes, for their maxima, sums and factors."""
    vectorize_rows(sch, "factors", "new_sum", "row")


def fold(sch: Schedule, tiling: VectorTiling) -> None:
    """Register tiles of acc, where what is folded lies in memory."""
    _fold_tile(sch, tiling)


def store_partial(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of acc as vectors."""
    vectorize_in_order(sch, tiling, "store_acc")


def normalize(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of out as vectors."""
    vectorize_rows(sch, "factor")
    vectorize_in_order(sch, tiling, "out")
    if tiling.many_tokens and tiling.scores_in_lanes:
        vectorize_in_order(sch, tiling, "ordered")


IN_PLACE: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    "load_query": load_query,
    "columns": functions.columns,
    "qk_matmul": qk_matmul,
    "visible_rows": functions.visible_rows,
    "softmax_prepare": softmax_prepare,
    "pair_probs": pair_probs,
    "pv_matmul": pv_matmul,
    "rescale": rescale,
    "pv_update": pv_update,
    "fold": fold,
    "store_partial": store_partial,
    "normalize": normalize,
} | scales.STAGES
"""How each stage is scheduled where keys and values are read as they lie, by the name of its sblock."""

STAGES = IN_PLACE | {"load_values": fours.load_values}
"""The same with values that are turned first."""

_AROUND = "loops around stages"
SCALAR = {
    "sequence": _AROUND,
    "query_tile": _AROUND,
    "kv_tile": _AROUND,
    "kv_head": _AROUND,
    "head_tile": _AROUND,
    "softmax": _AROUND,
    "result": _AROUND,
    "partial": _AROUND,
    "online_update": _AROUND,
    KEYS: "no computation: it says what is read next",
    VALUES: "no computation: it says what is read next",
    "every_key": "a word for each token of a block",
    "tree": "a look-up of tree_mask for each query token of a sequence",
    "token_offsets": "a look-up of block_table for each token, once for all heads",
} | scales.SCALAR
"""The sblocks that run as they are written, and why."""


def vectorize_rows(sch: Schedule, *sblocks: str) -> None:
    """Vectorize the innermost loop, which is over rows; of many, which are all heads, in parts of equal size."""
    for name in sblocks:
        row = sch.get_loops(name)[-1]
        if int(sch.get(row).extent) > _MAX_ROW_LANES:
            _, row = sch.split(row, [None, largest_divisor(int(sch.get(row).extent), _MAX_ROW_LANES)])
        sch.vectorize(row)


def vectorize_in_order(sch: Schedule, tiling: VectorTiling, sblock: str) -> None:
    """Vectorize the innermost loop, which is over value_dim."""
    sch.vectorize(sch.split(sch.get_loops(sblock)[-1], [None, tiling.pv_lanes * tiling.values.halves])[1])


def evens_first(sch: Schedule, lanes: int, halves: int, *sblocks: str | SBlockRV) -> None:
    """Where words are taken apart, lay what an sblock writes out as a vector of even elements, then one of odd ones."""
    for sblock in sblocks if halves > 1 else ():
        sch.transform_layout(
            sblock,
            ("write", 0),
            lambda *i: (*i[:-1], i[-1] // (lanes * halves), i[-1] % halves, i[-1] // halves % lanes),
        )


def in_registers(sch: Schedule, sums: SBlockRV, outer: LoopRV, *tile: LoopRV) -> None:
    """Unroll the loops of a register tile, the last of them as a vector, and write its sums back below outer."""
    sch.reverse_compute_at(sums, outer, preserve_unit_loops=True)
    unroll_tile(sch, sums, *tile)


def unroll_tile(sch: Schedule, sums: SBlockRV, *tile: LoopRV) -> None:
    """Unroll the loops of a register tile, the last of them as a vector, and as many of what writes its sums back."""
    for loop in (*sch.get_loops(sums)[-len(tile) : -1], *tile[:-1]):
        sch.unroll(loop)
    sch.vectorize(sch.get_loops(sums)[-1])
    sch.vectorize(tile[-1])
