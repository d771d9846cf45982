"""The end of a work item: a thread block's warps join their results, as one partial result or as out and lse."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.cuda.kernels.strategy import LOG2_E, NEGATIVE_INFINITY
from pa_compiler.cuda.tiling import CudaTiling
from pa_compiler.kernels.headroom import lifted
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


def join_warps(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """The results of all warps as one: the last of a work item, by all threads of its block.

    Where the sequence has one range, writes out[seq] and lse[seq]; otherwise the partial result of the item:
    partial_max, partial_sum and partial_acc at [item, head] and [item, head, head_dim].
    A row whose sum is 0 has no score but -inf, and gives 0 and -inf.
    """
    head_dim, heads, warps, rows = spec.head_dim, spec.num_heads, tiling.warps, tiling.row_tile
    pitch, threads = tiling.acc_pitch(spec), tiling.threads

    @inline
    def stage(warp_max, warp_sum, warp_acc, thread, whole, item, first_head, num_rows, headroom, partial_max,
              partial_sum, partial_acc, out, out_offset, out_head, lse, lse_offset):  # fmt: skip
        weight = T.alloc_buffer((warps,), "float32", scope="local")
        for step in range(T.truncdiv(num_rows * head_dim + (threads - 1), threads)):
            row: T.let = T.truncdiv(step * threads + thread, head_dim)
            d: T.let = T.truncmod(step * threads + thread, head_dim)
            if row < num_rows:
                highest: T.float32 = warp_max[row]
                for w in T.unroll(warps - 1):
                    highest = T.max(highest, warp_max[(w + 1) * rows + row])
                shift: T.let = T.Select(highest == T.float32(NEGATIVE_INFINITY), T.float32(0), highest)
                total: T.float32 = T.float32(0)
                value: T.float32 = T.float32(0)
                for w in T.unroll(warps):
                    T.ptx["ex2.approx.ftz.f32"](weight[w], (warp_max[w * rows + row] - shift) * T.float32(LOG2_E))
                    total = total + weight[w] * warp_sum[w * rows + row]
                    value = value + weight[w] * warp_acc[(w * rows + row) * pitch + d]
                head: T.let = T.Cast("int64", first_head + row)
                if whole:
                    out[out_offset + head * out_head + T.Cast("int64", d)] = T.Cast(
                        spec.result_dtype, T.Select(total == T.float32(0), value, value / total)
                    )
                    if d == 0:
                        lse[lse_offset + head] = T.Select(
                            total == T.float32(0),
                            T.float32(NEGATIVE_INFINITY),
                            shift + T.log(lifted(spec, total, headroom)),
                        )
                else:
                    slot: T.let = T.Cast("int64", item) * T.int64(heads) + head
                    partial_acc[slot * T.int64(head_dim) + T.Cast("int64", d)] = value
                    if d == 0:
                        partial_max[slot] = highest
                        partial_sum[slot] = total

    return stage
