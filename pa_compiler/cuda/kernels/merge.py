"""Merge on CUDA: the ranges of each sequence that was cut, joined by log-sum-exp in their order."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels.check import report_indices
from pa_compiler.cuda.kernels.plan import find_partials
from pa_compiler.cuda.kernels.strategy import LOG2_E, NEGATIVE_INFINITY
from pa_compiler.cuda.tiling import WARP, CudaTiling
from pa_compiler.kernels.headroom import headroom, lifted
from pa_compiler.spec import PagedAttentionSpec


def cuda_merge(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [batch * num_heads] of tiling.merge_threads threads: out and lse of one sequence and query head.

    Reads what cuda_decode left for the same context_lens and items: partial_max and partial_sum
    [items, num_heads] and partial_acc [items, num_heads, head_dim]. A sequence of one range has been written already.
    With a status other than 0 nothing is read or written but the report of what cuda_check found (cuda_check).
    """
    heads, head_dim, threads = spec.num_heads, spec.head_dim, tiling.merge_threads(spec)
    find_partials_stage = find_partials(tiling)
    report_stage = report_indices(spec)

    @T.prim_func
    def cuda_merge(
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        status_handle: T.handle,
        report_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        out_batch: T.int64,
        out_head: T.int64,
        lse_batch: T.int64,
        table_seq: T.int64,
        num_blocks: T.int64,
        max_blocks: T.int32,
        batch: T.int32,
        items: T.int32,
    ):
        table_span, length_span, status_span, report_span = T.int64(), T.int64(), T.int64(), T.int64()
        out_span, lse_span = T.int64(), T.int64()
        max_span, sum_span, acc_span = T.int64(), T.int64(), T.int64()
        block_table = T.match_buffer(block_table_handle, (table_span,), "int32")
        context_lens = T.match_buffer(context_lens_handle, (length_span,), "int32")
        status = T.match_buffer(status_handle, (status_span,), "int32")
        report = T.match_buffer(report_handle, (report_span,), "int64")
        partial_max = T.match_buffer(partial_max_handle, (max_span,), "float32")
        partial_sum = T.match_buffer(partial_sum_handle, (sum_span,), "float32")
        partial_acc = T.match_buffer(partial_acc_handle, (acc_span,), "float32")
        out = T.match_buffer(out_handle, (out_span,), spec.result_dtype)
        lse = T.match_buffer(lse_handle, (lse_span,), "float32")
        T.device_entry()
        cta = T.cta_id([batch * heads])
        warp_id = T.warp_id([threads // WARP])
        lane_id = T.lane_id([WARP])
        found = T.alloc_buffer((2,), "int32", scope="local")
        lane: T.int32 = lane_id
        thread: T.int32 = warp_id * WARP + lane
        seq: T.int32 = T.truncdiv(cta, heads)
        head: T.int32 = T.truncmod(cta, heads)
        if (status[0] != 0) & (cta == 0) & (thread == 0):
            report_stage(status, context_lens, block_table, table_seq, max_blocks, num_blocks, report)
        find_partials_stage(context_lens, batch, items - batch, seq, lane, found)
        if (found[1] > 1) & (status[0] == 0):
            first: T.int64 = T.Cast("int64", found[0]) * T.int64(heads) + T.Cast("int64", head)
            highest: T.float32 = T.float32(NEGATIVE_INFINITY)
            for i in range(found[1]):
                highest = T.max(highest, partial_max[first + T.Cast("int64", i * heads)])
            shift: T.float32 = T.Select(highest == T.float32(NEGATIVE_INFINITY), T.float32(0), highest)
            for step in T.unroll(-(-head_dim // threads)):
                d: T.int32 = step * threads + thread
                if d < head_dim:
                    total: T.float32 = T.float32(0)
                    value: T.float32 = T.float32(0)
                    for i in range(found[1]):
                        slot: T.int64 = first + T.Cast("int64", i * heads)
                        weight: T.float32 = T.float32(0)
                        T.ptx["ex2.approx.ftz.f32"](weight, (partial_max[slot] - shift) * T.float32(LOG2_E))
                        total = total + weight * partial_sum[slot]
                        value = value + weight * partial_acc[slot * T.int64(head_dim) + T.Cast("int64", d)]
                    where: T.int64 = T.Cast("int64", seq) * out_batch + T.Cast("int64", head) * out_head
                    out[where + T.Cast("int64", d)] = T.Cast(
                        spec.result_dtype, T.Select(total == T.float32(0), value, value / total)
                    )
                    if d == 0:
                        lse[T.Cast("int64", seq) * lse_batch + T.Cast("int64", head)] = T.Select(
                            total == T.float32(0),
                            T.float32(NEGATIVE_INFINITY),
                            shift + T.log(lifted(spec, total, headroom(spec, context_lens[seq]))),
                        )

    return cuda_merge
