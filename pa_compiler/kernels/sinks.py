"""Sinks: for each head one more score of the softmax, which has no value. It comes in where acc becomes out."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.exp import store_exp
from pa_compiler.kernels.rows import of_row
from pa_compiler.tvmscript import inline


def add_sinks_to(capacity: int) -> Callable[..., None]:
    """peak and total: row_max and row_sum with each row's sink; factor: what acc is multiplied by to be out."""

    @inline
    def stage(state, sinks, rows, headroom, peak, total, factor):
        slot = T.meta_var(state.slot)
        kept = T.sblock_alloc_buffer((capacity,), "float32")
        weight = T.sblock_alloc_buffer((capacity,), "float32")
        for r in range(capacity):
            with T.sblock("sink"):
                vr = T.axis.spatial(capacity, r)
                T.reads(state.row_max[slot, vr], state.row_sum[slot, vr], sinks[0 : sinks.shape[0]])
                T.writes(peak[vr], kept[vr], weight[vr])
                is_empty: T.let = state.row_sum[slot, vr] == T.float32(0)
                sink: T.let = T.if_then_else(vr < rows.num, sinks[rows.at(vr)[1]], T.float32("-inf"))
                m: T.let = T.Select(is_empty, sink, T.max(state.row_max[slot, vr], sink))
                peak[vr] = m
                store_exp(kept, (vr,), state.row_max[slot, vr] - m, T.Not(is_empty))
                store_exp(weight, (vr,), sink - m, sink != T.float32("-inf"), of_row(headroom, vr))
        for r in range(capacity):
            with T.sblock("sum_with_sink"):
                vr = T.axis.spatial(capacity, r)
                total[vr] = kept[vr] * state.row_sum[slot, vr] + weight[vr]
        for r in range(capacity):
            with T.sblock("factor"):
                vr = T.axis.spatial(capacity, r)
                factor[vr] = T.Select(total[vr] == T.float32(0), T.float32(0), kept[vr] / total[vr])

    return stage
