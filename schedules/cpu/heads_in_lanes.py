"""CPU strategy: the rows of a head tile lie side by side in the lanes of a vector register.

For tiles of whole vectors of query heads. Scores are [token, row], so the whole softmax is vertical: no reduction
across lanes anywhere. A row of the caches is broadcast element by element against a register of rows:

    qk_matmul    qk_tokens x row_tile sums in registers, one step per element of head_dim
    pv_matmul    pv_dims x row_tile sums in registers, one step per token

Every intermediate is laid out with its rows last. The query is turned once, and acc is turned back.
"""

import math
from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV
from tvm.tirx import IntImm

from pa_compiler.kernels.ahead import KEYS, VALUES
from pa_compiler.schedules.cpu import attend, functions, head_dim_in_lanes, integers, scales
from pa_compiler.schedules.cpu.by_element import read_vectors
from pa_compiler.schedules.cpu.head_dim_in_lanes import evens_first, in_registers, vectorize_rows
from pa_compiler.schedules.cpu.vertical import four_maxima, rows_last, sum_by_token, vertical
from pa_compiler.schedules.fetch import fetch
from pa_compiler.schedules.intrinsics.transpose import turn
from pa_compiler.tiles import Element, VectorTiling, largest_divisor

_LINE_WORDS = 16
"""Words of a line of the memory system: as many, and no fewer, are the work beside which its next one is fetched."""


def load_query(sch: Schedule, tiling: VectorTiling) -> None:
    """A transposed copy of the query."""
    rows = sch.cache_write("q_tile", 0, "global")
    rows_last(sch, rows)
    if tiling.keys.integers:
        integers.load_query(sch, tiling)
    if tiling.keys.terms == 2:  # LLVM loads whole vectors of pairs, where it would load every second element by itself
        turn(sch, rows, 4, 4)
        return
    turn(sch, rows, 4, 4, "q_tile")
    row, dim = sch.get_loops("q_tile")[-2:]
    sch.unroll(row)
    sch.vectorize(dim)


def load_keys(sch: Schedule, tiling: VectorTiling) -> None:
    """Convert whole rows of the cache."""
    _load_rows(sch, tiling.keys, tiling.qk_lanes, "load_keys_element")


def load_values(sch: Schedule, tiling: VectorTiling) -> None:
    """Convert whole rows of the cache."""
    _load_rows(sch, tiling.values, tiling.pv_lanes, "load_values_element")


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Scores of a token group in registers.

    Lines of float32 and of pairs are fetched a few at a time, the former in decode where that was measured, on x86. A
    core has some 24 under way from memory, and while it has, what it reads from its second-level cache waits too. What
    is converted has half as many, and takes longer.
    """
    rows_last(sch, "scores")
    group, shares = _sum_scores(sch, tiling, "scores")
    spreads = tiling.keys.dtype == "float32" and not (tiling.many_tokens or tiling.by_element)
    fetch(sch, KEYS, group, shares=shares if spreads or tiling.keys.terms == 2 else [])


def few_qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of a part of a vector of rows; qk_matmul has laid out what is written."""
    group, shares = _sum_scores(sch, tiling, "few_scores")
    fetch(sch, KEYS, group, shares=shares, at_once=tiling.few_groups)


def _sum_scores(sch: Schedule, tiling: VectorTiling, name: str) -> tuple[LoopRV, list[LoopRV]]:
    """Some token groups at a time; the loop over these, and those over parts of a register tile's steps.

    Of pairs a part is half of a vector of words: a few lines at a time are fetched while it is multiplied, and every
    second part reads the rest of lines that the one before it has brought into the first-level cache.
    """
    scores = sch.get_sblock(name)
    sums = sch.cache_write(scores, 0, "global")
    group, token, row, dim = sch.get_loops(scores)[-4:]
    lanes, halves, pairs = tiling.qk_lanes, tiling.keys.halves, tiling.keys.terms == 2
    steps = max(lanes, math.gcd(int(sch.get(dim).extent), _LINE_WORDS)) if pairs and tiling.by_element else lanes
    dim, step, half = sch.split(dim, [None, steps, halves])  # as the key lies in scratch
    sch.reorder(group, dim, step, half, token, row)
    parts = [dim]
    if pairs:
        part, step = sch.split(step, [2, None])
        parts.append(part)
        sch.unroll(step)  # for every token its address is read once for all of them
    in_registers(sch, sums, group, token, row)
    if tiling.by_element and halves == 1:
        read_vectors(sch, scores, step, lanes, tiling.copy_keys)
    sch.decompose_reduction(scores, dim)
    return group, parts


def visible_rows(sch: Schedule, tiling: VectorTiling) -> None:
    """What a mask shows each row: vertical too."""
    for name in functions.visible_steps(sch, tiling):
        rows_last(sch, name)
        row, group, token = sch.get_loops(name)[-3:]
        sch.reorder(group, token, row)
        sch.vectorize(row)


def softmax_prepare(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical in every step."""
    exact = ("exact",) if tiling.rounds_weights and not tiling.many_tokens else ()
    steps = functions.score_steps(sch, tiling)
    pairs = ("pairs",) if tiling.rounds_weights and tiling.many_tokens else ()
    rows_last(sch, *steps, "scaled", *exact, "probs", *pairs)
    four_maxima(sch, "peak")
    for name in (*steps, "scaled", *exact, "probs", *pairs, "tile_sum"):
        row, group, token = sch.get_loops(sch.get_sblock(name))[-3:]
        sch.reorder(group, token, row)
        if name == "tile_sum" and tiling.weight_sums:
            sum_by_token(sch)
            continue
        if name in (*pairs, "tile_sum") and tiling.many_tokens:  # beside the exponentials of the next group
            group = sch.get_loops("probs")[-3]
            sch.reverse_compute_at(name, group, preserve_unit_loops=True)
            row = sch.get_loops(name)[-1]
        sch.vectorize(row)
        if name == "tile_sum":
            sch.decompose_reduction(sch.get_sblock(name), group)
    vectorize_rows(sch, "tile_max", *(("room",) if "room" in _names(sch) else ()))


def full_scores(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical, with the maximum while a vector is stored; softmax_prepare has laid out what is written."""
    row, group, token = sch.get_loops("full_scaled")[-3:]
    sch.reorder(group, token, row)
    sch.vectorize(row)
    four_maxima(sch, "full_peak", group)


def pair_probs(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical too."""
    rows_last(sch, "pairs")
    row, group, token = sch.get_loops("pairs")[-3:]
    sch.reorder(group, token, row)
    sch.vectorize(row)


def pv_update(sch: Schedule, tiling: VectorTiling) -> None:
    """Outputs in registers over all whole token groups of the tile, then over the rest of the last one, then folded."""
    rows_last(sch, "acc")
    _sum_outputs(sch, tiling, "", tiling.pv_dims)


def few_pv_update(sch: Schedule, tiling: VectorTiling) -> None:
    """The same of a part of a vector of rows; pv_update has laid out what is written."""
    dims = int(sch.get(sch.get_loops("few_acc")[-1]).extent)
    _sum_outputs(sch, tiling, "few_", largest_divisor(dims, 2 * tiling.pv_dims))


def _sum_outputs(sch: Schedule, tiling: VectorTiling, of: str, dims: int) -> None:
    """With the sums of some elements of value_dim at a time in registers.

    Where pairs are multiplied by a lane of a register, these are elements that lie side by side in a copy: of words of
    two a vector of even ones or of odd ones.
    """
    full, passes = sch.get_sblock(f"{of}full_groups"), []
    lanes, halves, extent = tiling.pv_lanes, tiling.values.halves, int(sch.get(sch.get_loops(full)[-1]).extent)
    by_element = tiling.by_element and tiling.copy_values and tiling.values.terms == 2
    by_element = by_element and dims % lanes == extent % (dims * halves) == 0
    rows_last(sch, full, f"{of}tile_acc")
    for name in (f"{of}full_groups", f"{of}tile_acc", f"{of}acc"):
        _, *tokens, row, dim = sch.get_loops(name)
        outer, dim, *half = sch.split(dim, [None, dims, *([halves] if by_element and halves > 1 else [])])
        sch.reorder(outer, *half, *tokens, dim, row)
        sch.unroll(dim)
        sch.vectorize(row)
        if by_element and name == f"{of}full_groups":
            read_vectors(sch, full, dim, lanes, True, *half)
        if tokens:
            sch.decompose_reduction(name, tokens[0])
        passes.append((outer, *half))
    for loops in zip(*passes, strict=True):
        sch.merge(*loops)
    _, *around, group = sch.get_loops(full)[: 2 + len(passes[0])]
    fetch(sch, VALUES, group, passes=around)


def normalize(sch: Schedule, tiling: VectorTiling) -> None:
    """Turned back in registers, then in vectors of head_dim; row by row where a tile may be one short."""
    vectorize_rows(sch, "factor")
    stored = "out"
    if tiling.many_tokens:
        stored = "ordered"
        sch.vectorize(sch.split(sch.get_loops("out")[-1], [None, tiling.pv_lanes * tiling.values.halves])[1])
    in_order = sch.cache_read(stored, 0, "global")
    rows_last(sch, in_order)
    row, dim = sch.get_loops(stored)[-2:]
    row_outer, row = sch.split(row, [None, 4 if isinstance(sch.get(row).extent, IntImm) else 1])
    dim_outer, lane = sch.split(dim, [None, tiling.pv_lanes])
    sch.reorder(row_outer, dim_outer, row, lane)
    sch.compute_at(in_order, dim_outer, preserve_unit_loops=True)
    turn(sch, in_order, 4, 4)
    sch.unroll(row)
    sch.vectorize(lane)


def empty_state(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical."""
    vectorize_rows(sch, "empty_row")
    rows_last(sch, "empty_acc")
    vertical(sch, "empty_acc")


def edges(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical."""
    rows_last(sch, "edge")
    row, group, token = sch.get_loops("edge")[-3:]
    sch.reorder(group, token, row)
    sch.vectorize(row)


def range_fold(sch: Schedule, tiling: VectorTiling) -> None:
    """Vertical; empty_state has laid out what is written."""
    vertical(sch, "range_acc")


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    "load_query": load_query,
    "load_keys": load_keys,
    "load_values": load_values,
    "columns": functions.columns,
    "qk_matmul": qk_matmul,
    "few_qk_matmul": few_qk_matmul,
    "visible_rows": visible_rows,
    "softmax_prepare": softmax_prepare,
    "full_scores": full_scores,
    **scales.VERTICAL,
    "pair_probs": pair_probs,
    "rescale": head_dim_in_lanes.rescale,
    "pv_update": pv_update,
    "few_pv_update": few_pv_update,
    "empty_state": empty_state,
    "normalize": normalize,
    "bounds": attend.bounds,
    "edges": edges,
    "range_rescale": attend.range_rescale,
    "range_fold": range_fold,
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = head_dim_in_lanes.SCALAR | attend.SCALAR
SCALAR |= {"store_partial": "acc is turned back element by element, once for a range of a long sequence"}
"""The sblocks that run as they are written, and why."""


def _names(sch: Schedule) -> set[str]:
    """What is in the softmax."""
    return {sch.get(each).name_hint for each in sch.get_child_blocks(sch.get_sblock("softmax_prepare"))}


def _load_rows(sch: Schedule, element: Element, lanes: int, sblock: str) -> None:
    """Read a cache row in vectors, unrolled so that its address is computed once for many."""
    evens_first(sch, lanes, element.halves, sblock)
    dim = sch.get_loops(sblock)[-1]
    words = int(sch.get(dim).extent) // (lanes * element.halves)
    _, vector, lane, half = sch.split(dim, [None, largest_divisor(words, 16), lanes, element.halves])
    sch.reorder(vector, half, lane)
    sch.unroll(vector)
    sch.unroll(half)
    sch.vectorize(lane)
