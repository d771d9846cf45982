"""Merge on CUDA: the ranges of each sequence that was cut, joined by log-sum-exp in their order."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.kernels.check import Rows, report_indices
from pa_compiler.cuda.kernels.plan import find_partials
from pa_compiler.cuda.kernels.state import NEGATIVE_INFINITY, merge, normalize
from pa_compiler.cuda.tiles import WARP, CudaTiling
from pa_compiler.kernels.arrays import without
from pa_compiler.kernels.headroom import headroom
from pa_compiler.spec import PagedAttentionSpec


def cuda_merge(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [batch * num_heads] of tiling.merge_threads threads: out and lse of one sequence and query head.

    Reads the partial results that cuda_decode left for the same context_lens and items. A sequence of one range has
    been written already. With a status other than 0 nothing is read or written but the report of what cuda_check found.
    """
    arrays, heads, value_dim, threads = Arrays(spec), spec.num_heads, spec.result_dim, tiling.merge_threads(spec)
    find_partials_stage, report_stage = find_partials(spec, tiling), report_indices(spec)
    merge_stage, normalize_stage = merge(T.serial, value_dim), normalize(spec)

    @T.prim_func
    def cuda_merge(
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        status_handle: T.handle,
        report_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        sinks_handle: T.handle,
        out_batch: T.int64,
        out_head: T.int64,
        lse_batch: T.int64,
        sink_head: T.int64,
        table_seq: T.int64,
        row_step: T.int64,
        num_entries: T.int64,
        num_blocks: T.int64,
        max_blocks: T.int32,
        batch: T.int32,
        items: T.int32,
    ):
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        context_lens = arrays.context_lens(context_lens_handle)
        status = arrays.status(status_handle)
        report = arrays.report(report_handle)
        partials = T.meta_var(arrays.partials(partial_max_handle, partial_sum_handle, partial_acc_handle))
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        if spec.sinks:
            sinks = arrays.sinks(sinks_handle)
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
            rows = T.meta_var(Rows(block_table, table_seq, row_starts, row_step, max_blocks, num_entries))
            report_stage(status, context_lens, rows, num_blocks, report)
        find_partials_stage(context_lens, batch, items - batch, seq, lane, found)
        if (found[1] > 1) & (status[0] == 0) & (thread < value_dim):
            first: T.int64 = T.Cast("int64", found[0]) * T.int64(heads) + T.Cast("int64", head)
            highest: T.float32 = T.float32(NEGATIVE_INFINITY)
            total: T.float32 = T.float32(0)
            value: T.float32 = T.float32(0)
            merge_stage(partials, first, heads, found[1], thread, highest, total, value)
            where: T.int64 = T.Cast("int64", seq) * out_batch + T.Cast("int64", head) * out_head
            normalize_stage(
                highest, total, value, thread, headroom(spec, context_lens[seq]), out,
                where + T.Cast("int64", thread), lse, T.Cast("int64", seq) * lse_batch + T.Cast("int64", head),
                sinks[T.Cast("int64", head) * sink_head] if spec.sinks else None,
            )  # fmt: skip

    return without(cuda_merge, *(() if spec.sinks else ("sink_head",)))
