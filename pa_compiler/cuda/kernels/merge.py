"""Merge on CUDA: the ranges of each sequence that was cut, joined by log-sum-exp in their order."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.kernels.check import Rows, report_indices
from pa_compiler.cuda.kernels.check_queries import report_queries
from pa_compiler.cuda.kernels.plan import SEQ, Sequences, find_sequence
from pa_compiler.cuda.kernels.state import NEGATIVE_INFINITY, merge, normalize
from pa_compiler.cuda.tiles import WARP, CudaTiling, merge_threads
from pa_compiler.kernels.arrays import without
from pa_compiler.kernels.headroom import headroom
from pa_compiler.spec import PagedAttentionSpec


def cuda_merge(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [batch * num_heads] of merge_threads threads: out and lse of one sequence and query head.

    Reads the partial results that cuda_decode left for the same context_lens. A sequence of one range has been written
    already. With a status other than 0 nothing is read or written but the report of what cuda_check found.
    """
    return merge_ranges(spec, tiling, many_tokens=False).with_attr("global_symbol", "cuda_merge")


def cuda_merge_attend(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [num_tokens * num_heads]: the same of one query token and query head, of what cuda_attend left."""
    return merge_ranges(spec, tiling, many_tokens=True).with_attr("global_symbol", "cuda_merge_attend")


def merge_ranges(spec: PagedAttentionSpec, tiling: CudaTiling, many_tokens: bool) -> PrimFunc:
    """cuda_merge, or cuda_merge_attend."""
    arrays, heads, value_dim, threads = Arrays(spec), spec.num_heads, spec.result_dim, merge_threads(spec)
    find_sequence_stage = find_sequence()
    report_stage = report_queries(spec) if many_tokens else report_indices(spec)
    merge_stage, normalize_stage = merge(T.serial, value_dim), normalize(spec)

    @T.prim_func
    def cuda_merge_ranges(
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        query_start_loc_handle: T.handle,
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
        num_tokens: T.int32,
        sees_all: T.int32,
        tree_cells: T.int64,
    ):
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        context_lens = arrays.context_lens(context_lens_handle)
        if many_tokens:
            query_start_loc = arrays.query_start_loc(query_start_loc_handle)
        status = arrays.status(status_handle)
        report = arrays.report(report_handle)
        partials = T.meta_var(arrays.partials(partial_max_handle, partial_sum_handle, partial_acc_handle))
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        if spec.sinks:
            sinks = arrays.sinks(sinks_handle)
        T.device_entry()
        cta = T.cta_id([(num_tokens if many_tokens else batch) * heads])
        warp_id = T.warp_id([threads // WARP])
        lane_id = T.lane_id([WARP])
        found = T.alloc_buffer((1,), "int32", scope="local")
        lane: T.int32 = lane_id
        thread: T.int32 = warp_id * WARP + lane
        token: T.int32 = T.truncdiv(cta, heads)
        head: T.int32 = T.truncmod(cta, heads)
        sequences = T.meta_var(Sequences(spec, batch, context_lens, query_start_loc if many_tokens else None))
        if (status[0] != 0) & (cta == 0) & (thread == 0):
            table = T.meta_var(Rows(block_table, table_seq, row_starts, row_step, max_blocks, num_entries))
            if many_tokens:
                report_stage(status, sequences, table, sees_all, num_blocks, num_tokens, tree_cells, report)
            else:
                report_stage(status, context_lens, table, num_blocks, report)
        if status[0] == 0:
            found[SEQ] = token
            if many_tokens:
                find_sequence_stage(sequences, token, lane, found)
            ranges: T.int32 = sequences.num_ranges(tiling, found[SEQ])
            if (ranges > 1) & (thread < value_dim):
                first: T.int64 = T.Cast("int64", token) * T.int64(heads) + T.Cast("int64", head)
                slots: T.int64 = T.Cast("int64", num_tokens if many_tokens else batch) * T.int64(heads)  # of a range
                highest: T.float32 = T.float32(NEGATIVE_INFINITY)
                total: T.float32 = T.float32(0)
                value: T.float32 = T.float32(0)
                merge_stage(partials, first, slots, ranges, thread, highest, total, value)
                where: T.int64 = T.Cast("int64", token) * out_batch + T.Cast("int64", head) * out_head
                normalize_stage(
                    highest, total, value, thread, headroom(spec, context_lens[found[SEQ]]), out,
                    where + T.Cast("int64", thread), lse, T.Cast("int64", token) * lse_batch + T.Cast("int64", head),
                    sinks[T.Cast("int64", head) * sink_head] if spec.sinks else None,
                )  # fmt: skip

    unused = [] if spec.sinks else ["sink_head"]
    return without(cuda_merge_ranges, *unused, *(() if many_tokens else ("num_tokens", "sees_all", "tree_cells")))
