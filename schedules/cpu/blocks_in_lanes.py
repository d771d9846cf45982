"""CPU strategy of attend: matmuls by an instruction whose four lanes are a block of 2 rows x 2 columns (bfmmla).

    qk_matmul    blocks of 2 rows x 2 tokens, all of a tile's rows and a group of tokens in registers, one step for two
                 pairs of head_dim
    pv_matmul    blocks of 2 rows x 2 elements of value_dim, one step for two pairs of tokens, over all groups of tokens
                 that all rows see; what is after them as where rows lie in lanes
    the rest     as where rows lie in the lanes of a vector register

Operands are blocks too: two pairs of two rows lie side by side. The query, and the copies of keys and values, which all
tiles of rows share, are laid out so when they are made, weights when they are multiplied, and sums are turned by
shuffles when they leave their registers.
"""

from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import For, IntImm

from pa_compiler.kernels.ahead import KEYS, VALUES
from pa_compiler.schedules.cpu import heads_in_lanes
from pa_compiler.schedules.cpu.vertical import rows_last
from pa_compiler.schedules.fetch import fetch
from pa_compiler.schedules.intrinsics.block_products import LANES, PAIRS, ROWS, add_block, split_rows, turn_halves
from pa_compiler.schedules.intrinsics.transpose import transpose
from pa_compiler.statements import changed
from pa_compiler.tiles import VectorTiling, largest_divisor

_STEPS = 4
"""Steps of qk_matmul that are one iteration of its loop."""


def load_query(sch: Schedule, tiling: VectorTiling) -> None:
    """Blocks of two rows."""
    copy = sch.cache_write("q_tile", 0, "global")
    sch.transform_layout(copy, ("write", 0), lambda tile, row, word: (tile, word // PAIRS, row, word % PAIRS))
    _split(sch, copy)


def load_keys(sch: Schedule, tiling: VectorTiling) -> None:
    """Blocks of two tokens; all of a token group for two pairs of head_dim, and then for the next.

    Where a pair of head_dim is a row of tokens, as packed, it is read so.
    """
    group, name = tiling.token_group, "load_keys_element"
    copy = _of_groups(sch, name)
    sch.transform_layout(
        copy, ("write", 0), lambda token, word: (token // group, word // PAIRS, token % group, word % PAIRS)
    )
    if not _is_packed(tiling):
        _split(sch, copy, name)
        return
    token, word = sch.get_loops(copy)[-2:]
    token_outer, token = sch.split(token, [None, LANES])
    word_outer, word = sch.split(word, [None, PAIRS])
    sch.reorder(token_outer, word_outer, token, word)
    rows_last(sch, name)
    _load_at(sch, name, word_outer, token_lanes=True)
    sch.tensorize(token, transpose(PAIRS, LANES, "int32", by_turned=True))


def load_values(sch: Schedule, tiling: VectorTiling) -> None:
    """Blocks of two elements of value_dim; four elements of all tokens, and then the next."""
    halves, name = tiling.values.halves, "load_values_element"
    copy = _of_groups(sch, name)
    if halves == 2:
        sch.transform_layout(name, ("write", 0), lambda pair, dim: (pair, dim % 2, dim // 2))
    sch.transform_layout(copy, ("write", 0), lambda pair, dim: (dim // LANES, pair // PAIRS, dim % LANES, pair % PAIRS))
    pair, dim = sch.get_loops(copy)[-2:]
    pair_outer, pair = sch.split(pair, [None, PAIRS])
    vector, dim = sch.split(dim, [None, LANES * halves])
    sch.reorder(pair_outer, vector, pair, dim)
    _load_at(sch, name, vector, halves)
    sch.tensorize(pair, turn_halves() if halves == 2 else transpose(PAIRS, LANES, "int32"))


def _is_packed(tiling: VectorTiling) -> bool:
    """Whether the words of keys are pairs of head_dim with tokens side by side: then a word of values is of two."""
    return tiling.values.word == 2 and tiling.values.halves == 1


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Scores of a token group in registers."""
    rows_last(sch, "scores")
    fetch(sch, KEYS, *_sum_scores(sch, "scores"))


def few_qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of a part of the rows; qk_matmul has laid out what is written."""
    group, shares = _sum_scores(sch, "few_scores")
    fetch(sch, KEYS, group, shares=shares, at_once=tiling.few_groups)


def _sum_scores(sch: Schedule, name: str) -> tuple[LoopRV, list[LoopRV]]:
    """Some token groups at a time; the loop over these, and the one over steps of head_dim."""
    scores = sch.get_sblock(name)
    sums = sch.cache_write(scores, 0, "global")
    group, token, row, word = sch.get_loops(scores)[-4:]
    words = int(sch.get(word).extent) // PAIRS
    word, pair = sch.split(word, [None, largest_divisor(words, _STEPS) * PAIRS])
    _sum_blocks(sch, scores, sums, group, [word], {"c": token, "r": row, "k": pair})
    return group, [word]


def _sum_blocks(
    sch: Schedule, block: SBlockRV, sums: SBlockRV, outer: LoopRV, steps: list[LoopRV], inner: dict[str, LoopRV]
) -> None:
    """Sums of all rows and columns of an iteration of outer in registers, and there turned, so that rows lie in lanes.

    Before, rows lie last in what is written. inner: The loops over rows r, columns c and pairs k, in the order of the
    axes; all pairs are those of one step.
    """
    tiles = {axis: sch.split(loop, [None, 2]) for axis, loop in inner.items()}
    column_outer, row_outer = tiles["c"][0], tiles["r"][0]
    in_block = [tile for _, tile in tiles.values()]
    sch.reorder(*steps, tiles["k"][0], column_outer, row_outer, *in_block)
    sch.reverse_compute_at(sums, outer, preserve_unit_loops=True)
    sch.transform_layout(block, ("write", 0), lambda *i: (*i[:-2], i[-2] // ROWS, i[-1], i[-2] % ROWS))
    cleared = sch.decompose_reduction(block, steps[0])
    *around, one, other = sch.get_loops(cleared)[-4:]
    cleared_row, cleared_column = (one, other) if list(inner).index("r") < list(inner).index("c") else (other, one)
    sch.reorder(cleared_row, cleared_column)
    sch.vectorize(sch.fuse(cleared_row, cleared_column))
    turned_column, turned_row = sch.get_loops(sums)[-2:]
    columns_outer, turned_column = sch.split(turned_column, [None, ROWS])
    rows_outer, turned_row = sch.split(turned_row, [None, LANES])
    sch.reorder(columns_outer, rows_outer, turned_column, turned_row)
    sch.tensorize(turned_column, transpose(LANES, ROWS, "float32", by_turned=True))
    sch.tensorize(in_block[0], add_block("".join(inner)))
    for loop in (*around, columns_outer, rows_outer, tiles["k"][0], column_outer, row_outer):
        sch.unroll(loop)


def pv_update(sch: Schedule, tiling: VectorTiling) -> None:
    """Outputs in registers over all whole token groups of the tile, then over the rest of the last one, then folded."""
    rows_last(sch, "acc")
    _sum_outputs(sch, tiling, "", tiling.pv_dims)


def few_pv_update(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of a part of the rows; pv_update has laid out what is written."""
    dims = int(sch.get(sch.get_loops("few_acc")[-1]).extent)
    _sum_outputs(sch, tiling, "few_", largest_divisor(dims, 2 * tiling.pv_dims))


def _sum_outputs(sch: Schedule, tiling: VectorTiling, of: str, dims: int) -> None:
    """With the sums of some elements of value_dim at a time in registers."""
    full, passes = sch.get_sblock(f"{of}full_groups"), []
    weights = sch.cache_read(full, 0, "global", [full])
    sch.transform_layout(weights, ("write", 0), lambda i, pair, row: (i, pair // PAIRS, row, pair % PAIRS))
    group, _, row, _ = sch.get_loops(full)[-4:]
    _turn_weights(sch, weights, group, int(sch.get(row).extent))
    _reads_copies(sch, full)
    rows_last(sch, full, f"{of}tile_acc")
    sums = sch.cache_write(full, 0, "global")
    for name in (f"{of}full_groups", f"{of}tile_acc", f"{of}acc"):
        _, *tokens, row, dim = sch.get_loops(name)
        outer, dim = sch.split(dim, [None, dims])
        sch.reorder(outer, *tokens, dim, row)
        passes.append(outer)
        if name == f"{of}full_groups":
            _sum_blocks(sch, full, sums, outer, [group], {"k": tokens[-1], "r": row, "c": dim})
            continue
        sch.unroll(dim)
        sch.vectorize(row)
        if tokens:
            sch.decompose_reduction(name, tokens[0])
    outer = sch.merge(*passes)
    fetch(sch, VALUES, group, passes=[outer])


def _turn_weights(sch: Schedule, copy: SBlockRV, group: LoopRV, rows: int) -> None:
    """Words of two pairs of tokens, where rows lie side by side, as blocks of two rows: of all groups that are summed.

    TVM would copy all that the array has room for.
    """
    pair, row = sch.get_loops(copy)[-2:]
    pair_outer, pair = sch.split(pair, [None, PAIRS])
    row_outer, row = sch.split(row, [None, LANES])
    sch.reorder(pair_outer, row_outer, pair, row)
    sch.tensorize(pair, transpose(PAIRS, LANES, "int32"))
    for loop, extent in ((row_outer, IntImm("int32", rows // LANES)), (pair_outer, sch.get(group).extent)):
        old = sch.get(loop)
        new = For(old.loop_var, old.min, extent, old.kind, old.body, old.thread_binding, old.annotations)
        sch.state.replace(sch.get_sref(loop), new, {})
    sch.unroll(row_outer)


def _reads_copies(sch: Schedule, block: SBlockRV) -> None:
    """Say that a sum over a copy reads no more than its operands: not where they were copied from."""
    old = sch.get(block)
    new = changed(old, reads=old.reads[:2])
    sch.state.replace(sch.get_sref(block), new, {old: new})


def _of_groups(sch: Schedule, name: str) -> SBlockRV:
    """What copies a token group of what an sblock makes: how many there are is known at run time only."""
    sch.blockize(sch.get_loops(name)[-2])
    return sch.cache_write(name, 0, "global")


def _split(sch: Schedule, copy: SBlockRV, name: str = "") -> None:
    """Two rows of words as blocks, four words at a time, which the named sblock makes just before."""
    row, word = sch.get_loops(copy)[-2:]
    row_outer, row = sch.split(row, [None, ROWS])
    vector, word = sch.split(word, [None, LANES])
    sch.reorder(row_outer, vector, row, word)
    if name:
        _load_at(sch, name, vector)
    sch.tensorize(row, split_rows())


def _load_at(sch: Schedule, name: str, vector: LoopRV, halves: int = 1, token_lanes: bool = False) -> None:
    """Make two vectors just before they are copied, each of a row of words, or of a word of several tokens.

    Where a word has two elements they are twice as many, with the even and the odd elements apart.
    """
    sch.compute_at(name, vector, preserve_unit_loops=True)
    row, word = sch.get_loops(name)[-2:]
    if token_lanes:
        row, word = word, row
    lane, half = sch.split(word, [None, halves])
    sch.reorder(row, half, lane)
    for loop in (row, half):
        sch.unroll(loop)
    sch.vectorize(lane)


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    name: apply
    for name, apply in heads_in_lanes.STAGES.items()
    if name not in ("columns", "integer_weights", "visible_rows", "sum_zeros")
} | {
    "load_query": load_query,
    "load_keys": load_keys,
    "load_values": load_values,
    "qk_matmul": qk_matmul,
    "few_qk_matmul": few_qk_matmul,
    "pv_update": pv_update,
    "few_pv_update": few_pv_update,
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = heads_in_lanes.SCALAR
"""The sblocks that run as they are written, and why."""
