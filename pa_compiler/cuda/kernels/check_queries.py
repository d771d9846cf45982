"""Checks of attend's indices on the GPU, as check.py has those of decode: query_start_loc and the tree_mask too."""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer, PrimFunc

from pa_compiler.bounds import bounds
from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.kernels.check import (
    BAD_BLOCK,
    BAD_LENGTH,
    BLOCK_CODE,
    CODE,
    INDEX,
    LENGTH_CODE,
    LIMIT,
    POSITION,
    PUBLISH,
    RAISE,
    ROW_CODE,
    VALUE,
    VIOLATION,
    Rows,
)
from pa_compiler.cuda.kernels.plan import Sequences, find_tree
from pa_compiler.cuda.kernels.sight import widen_runs
from pa_compiler.cuda.tiles import WARP
from pa_compiler.cuda.tiling import CHECK_THREADS
from pa_compiler.interface import GPU_QUERY_TOKENS, REPORT_CODES
from pa_compiler.kernels.arrays import without
from pa_compiler.kernels.rows import BEYOND
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

QUERIES_CODE, TREE_CODE = map(REPORT_CODES.index, ("queries", "tree"))


def cuda_check_queries(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [batch] of CHECK_THREADS threads: the indices of attend, before cuda_attend.

    Of block_table the entries are looked at that one of a sequence's query tokens may see: of each interval of the
    bounds all from the first to the last. tree_cells are the elements of tree_mask, or negative where there is none;
    that they are as many as they have to be is the business of the first block, and a violation of sequence `batch`.
    """
    arrays, num_runs = Arrays(spec), len(bounds(spec, many_tokens=True).intervals)
    find_runs_stage, find_tree_stage = find_runs(spec), find_tree()

    @T.prim_func
    def cuda_check_queries(
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        query_start_loc_handle: T.handle,
        status_handle: T.handle,
        table_seq: T.int64,
        row_step: T.int64,
        num_entries: T.int64,
        num_blocks: T.int64,
        tree_cells: T.int64,
        batch: T.int32,
        num_tokens: T.int32,
        max_blocks: T.int32,
        sees_all: T.int32,
    ):
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        table = T.meta_var(Rows(block_table, table_seq, row_starts, row_step, max_blocks, num_entries))
        context_lens = arrays.context_lens(context_lens_handle)
        query_start_loc = arrays.query_start_loc(query_start_loc_handle)
        status = arrays.status(status_handle)
        T.device_entry()
        cta = T.cta_id([batch])
        warp_id = T.warp_id([CHECK_THREADS // WARP])
        lane_id = T.lane_id([WARP])
        lane: T.int32 = lane_id
        thread: T.int32 = warp_id * WARP + lane
        seq: T.int32 = cta
        sequences = T.meta_var(Sequences(spec, batch, context_lens, query_start_loc))
        runs = T.alloc_buffer((2 * num_runs,), "int32", scope="local")
        cells = T.alloc_buffer((1,), "int32", scope="local")
        if (cta == 0) & (tree_cells >= T.int64(0)):
            find_tree_stage(sequences, batch, lane, cells)
            if (thread == 0) & (T.Cast("int64", cells[0]) != tree_cells):
                T.ptx[RAISE](status.ptr_to([0]), VIOLATION - (2 * batch + BAD_LENGTH))
        wrong: T.bool = T.Or(has_bad_length(spec, sequences, table, seq), has_bad_queries(sequences, seq, num_tokens))
        if table.is_wrong(T.Cast("int64", seq)) | wrong:
            if thread == 0:
                T.ptx[RAISE](status.ptr_to([0]), VIOLATION - (2 * seq + BAD_LENGTH))
        else:
            find_runs_stage(sequences, seq, sees_all != 0, runs)
            row: T.int64 = table.start(T.Cast("int64", seq))
            for run in T.unroll(num_runs):
                first: T.int32 = T.truncdiv(runs[2 * run], spec.block_size)
                used: T.int32 = T.truncdiv(runs[2 * run + 1] + (spec.block_size - 1), spec.block_size)
                for step in range(T.truncdiv(T.max(used - first, 0) + (CHECK_THREADS - 1), CHECK_THREADS)):
                    i: T.int32 = first + step * CHECK_THREADS + thread
                    if i < used:
                        block: T.int32 = block_table[row + T.Cast("int64", i)]
                        if (block < 0) | (T.Cast("int64", block) >= num_blocks):
                            T.ptx[RAISE](status.ptr_to([0]), VIOLATION - (2 * seq + BAD_BLOCK))

    return without(cuda_check_queries)


def has_bad_length(spec: PagedAttentionSpec, sequences: Sequences, table: Rows, seq: Expr) -> Expr:
    """Whether a sequence has a negative number of tokens, or more than there are blocks for."""
    length = T.Cast("int64", sequences.context_lens[seq])
    return T.Or(length < T.int64(0), length > table.most_tokens(T.Cast("int64", seq), spec.block_size))


def has_bad_queries(sequences: Sequences, seq: Expr, num_tokens: Expr) -> Expr:
    """Whether its query tokens do not begin and end where they may, or are more than it has tokens, or than can be."""
    begin, end = sequences.start(seq), sequences.start(seq + 1)
    ends = T.Or(T.And(seq == 0, begin != 0), T.And(seq == sequences.batch - 1, end != num_tokens))
    count = T.Cast("int64", end) - T.Cast("int64", begin)
    return T.Or(T.Or(ends, T.Or(begin < 0, count < T.int64(0))), count > most_queries(sequences, seq))


def most_queries(sequences: Sequences, seq: Expr) -> Expr:
    """Query tokens that a sequence may have, int64."""
    return T.min(T.Cast("int64", sequences.context_lens[seq]), T.int64(GPU_QUERY_TOKENS))


def find_runs(spec: PagedAttentionSpec) -> Callable[..., None]:
    """runs[2 * i], runs[2 * i + 1] = the first key that a query token sees of interval i, and one past the last."""

    def begin(runs: Buffer) -> None:
        for i in range(int(runs.shape[0])):
            T.buffer_store(runs, T.int32(0 if i % 2 else BEYOND), [i])

    @inline
    def stage(sequences, seq, sees_all, runs):
        begin(runs)
        for nth in range(sequences.num_tokens(seq)):
            query_end: T.int32 = sequences.first_pos(seq) + nth + 1
            seen: T.int32 = T.Select(sees_all, sequences.context_lens[seq], query_end)
            widen_runs(spec, runs, 0, seen, query_end)

    return stage


def report_queries(spec: PagedAttentionSpec) -> Callable[..., None]:
    """What cuda_check_queries found, as a report: for one thread of a kernel that has seen a status other than 0."""
    num_runs, find_runs_stage = len(bounds(spec, many_tokens=True).intervals), find_runs(spec)

    def allocate_runs() -> Buffer:
        return IRBuilder.name("runs", T.alloc_buffer((2 * num_runs,), "int32", scope="local"))

    @inline
    def stage(status, sequences, table, sees_all, num_blocks, num_tokens, tree_cells, report):
        found: T.int32 = VIOLATION - status[0]
        seq: T.int32 = T.truncdiv(found, 2)
        wide: T.int64 = T.Cast("int64", seq)
        report[INDEX] = wide
        code: T.int64 = T.int64(QUERIES_CODE)
        if seq == sequences.batch:
            code = T.int64(TREE_CODE)
            cells: T.int64 = T.int64(0)
            for i in range(sequences.batch):
                count: T.let = T.Cast("int64", sequences.num_tokens(i))
                cells = cells + count * count
            report[VALUE] = tree_cells
            report[LIMIT] = cells
        elif table.is_wrong(wide):
            code = T.int64(ROW_CODE)
            report[POSITION] = table.place(wide)
            report[VALUE] = table.place(wide + T.int64(1))
            report[LIMIT] = table.num_entries
        elif has_bad_length(spec, sequences, table, seq):
            code = T.int64(LENGTH_CODE)
            report[VALUE] = T.Cast("int64", sequences.context_lens[seq])
            report[LIMIT] = table.most_tokens(wide, spec.block_size)
        elif has_bad_queries(sequences, seq, num_tokens):
            report[POSITION] = T.Cast("int64", sequences.start(seq))
            report[VALUE] = T.Cast("int64", sequences.start(seq + 1))
            report[LIMIT] = most_queries(sequences, seq)
        else:
            code = T.int64(BLOCK_CODE)
            report[LIMIT] = num_blocks
            runs = T.meta_var(allocate_runs())
            find_runs_stage(sequences, seq, sees_all != 0, runs)
            row: T.int64 = table.start(wide)
            for run in T.unroll(num_runs):
                past: T.int32 = T.truncdiv(runs[2 * run + 1] + (spec.block_size - 1), spec.block_size)
                at: T.int32 = past - 1
                while at >= T.truncdiv(runs[2 * run], spec.block_size):
                    block: T.let = T.Cast("int64", table.table[row + T.Cast("int64", at)])
                    if (block < T.int64(0)) | (block >= num_blocks):
                        report[POSITION] = T.Cast("int64", at)
                        report[VALUE] = block
                    at = at - 1
        T.ptx[PUBLISH](report.ptr_to([CODE]), code)

    return stage
