"""Zero points of codes: what they add to scores and to outputs, outside of the matmuls.

number = scale * code + zero point. A key's zero point adds itself times the sum of the query to the score, and a
value's itself times the weight to every element of the output: one number for each tile of tokens and each row, which
comes in when the tile is folded (state.Factors).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.elements import FOUR_ONES, dot_fours
from pa_compiler.kernels.integers import MIDDLE_CODE
from pa_compiler.kernels.kept import allocate
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline, opaque


def allocate_sums(spec: PagedAttentionSpec, name: str, slots: int, rows: int) -> Buffer | None:
    """A buffer [slots, rows] of what is added up for zero points; None where there are none."""
    return allocate(name, (slots, rows), "float32") if spec.has_zeros else None


def sum_queries(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """sums[tile, r] = sum over d of q_tile[tile, r, d], in the sblock query_sums, where there are zero points.

    Of words of integers it is units[tile, r] times the sum of these: a score is that of the query as it is multiplied.
    """
    rows, depth = tiling.row_tile, spec.head_dim // tiling.keys.terms

    @inline
    def add_up(q_tile, sums, tile):
        with T.sblock("query_sums"):
            T.reads(q_tile[tile, 0:rows, 0:depth])
            T.writes(sums[tile, 0:rows])
            for d, r in T.grid(depth, rows):
                with T.sblock("query_sum"):
                    vd, vr = T.axis.remap("RS", [d, r])
                    with T.init():
                        sums[tile, vr] = T.float32(0)
                    sums[tile, vr] += q_tile[tile, vr, vd]

    @inline
    def add_up_integers(q_tile, sums, tile, units):
        with T.sblock("query_sums"):
            T.reads(q_tile[tile, 0:rows, 0:depth], units[tile, 0:rows])
            T.writes(sums[tile, 0:rows])
            total = T.sblock_alloc_buffer((rows,), "int32")
            for d, r in T.grid(depth, rows):
                with T.sblock("query_sum"):
                    vd, vr = T.axis.remap("RS", [d, r])
                    with T.init():
                        total[vr] = 0
                    total[vr] += dot_fours(q_tile[tile, vr, vd], opaque(T.int32(FOUR_ONES)))
            for r in range(rows):
                with T.sblock("query_sum_in_units"):
                    vr = T.axis.spatial(rows, r)
                    sums[tile, vr] = T.Cast("float32", total[vr]) * units[tile, vr]

    def stage(q_tile, sums, tile, units=None):
        if sums is None:
            return
        if tiling.keys.integers:
            add_up_integers(q_tile, sums, tile, units)
        else:
            add_up(q_tile, sums, tile)

    return stage


def sum_zeros(tiling: Tiling) -> Callable[..., None]:
    """total[slot, r] = sum over t of probs[slot, r, t] times the zero point of the value, for num_groups token groups.

    And MIDDLE_CODE times lost[slot, r], where weights lose something. The sblock sum_zeros. A weight of 0 stays 0,
    whatever the zero point is.
    """
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile

    @inline
    def add_up(probs, total, zeros, slot, num_groups, lost):
        with T.sblock("sum_zeros"):
            T.reads(probs[slot, 0:rows, 0:tokens], whole(zeros), *([] if lost is None else [lost[slot, 0:rows]]))
            T.writes(total[slot, 0:rows])
            parts = T.sblock_alloc_buffer((rows, group), "float32")
            for r, to, i in T.grid(rows, num_groups, group):
                with T.sblock("zero_parts"):
                    vr, vi = T.axis.remap("SS", [r, i])
                    vo = T.axis.reduce(tokens // group, to)
                    T.reads(probs[slot, vr, vo * group + vi], zeros[vo * group + vi])
                    T.writes(parts[vr, vi])
                    with T.init():
                        parts[vr, vi] = T.float32(0)
                    prob = T.meta_var(probs[slot, vr, vo * group + vi])
                    parts[vr, vi] = parts[vr, vi] + T.Select(
                        prob == T.float32(0), T.float32(0), prob * zeros[vo * group + vi]
                    )
            for r, i in T.grid(rows, group):
                with T.sblock("zero_sum"):
                    vr, vi = T.axis.remap("SR", [r, i])
                    with T.init():
                        total[slot, vr] = T.float32(0) if lost is None else lost[slot, vr] * T.float32(MIDDLE_CODE)
                    total[slot, vr] += parts[vr, vi]

    def stage(probs, total, of_head, slot, num_groups, lost=None):
        if total is not None:
            add_up(probs, total, of_head.value_zeros, slot, num_groups, lost)

    return stage
