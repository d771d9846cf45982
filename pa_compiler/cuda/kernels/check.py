"""Checks of indices on the GPU, for check="device": a status word says what was wrong, and nothing waits for it.

The word belongs to one call and is 0 where all is well. Otherwise it is VIOLATION - (2 * position + kind), of the
lowest position that is wrong: kernels that find a word other than 0 leave everything as it is. The last kernel of the
call then writes a report, int64 with the REPORT_FIELDS of interface.py, to memory that the host reads when it likes:
the sequence or token, the position in the sequence's row of block_table, the value found, and the limit that it broke.
The code, one of REPORT_CODES, is written last, with all the others in place for whoever sees it.
"""

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler.bounds import affine
from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.tiles import WARP
from pa_compiler.cuda.tiling import CHECK_THREADS
from pa_compiler.interface import REPORT_CODES, REPORT_FIELDS
from pa_compiler.kernels.rows import first_seen, limit, sees_block
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

VIOLATION = 0x7FFFFFFF

BAD_LENGTH, BAD_BLOCK = 0, 1
"""Kinds, where the position is a sequence: its context_len is negative or more than its row of block_table has blocks
for, or the row is not within the table; or it names a block outside [0, num_blocks) for one of its tokens."""

BAD_SLOT = 0
"""Kind, where the position is a token: its slot is neither -1 nor in [0, num_blocks * block_size)."""

LENGTH_CODE, BLOCK_CODE, SLOT_CODE, ROW_CODE = map(REPORT_CODES.index, ("context_len", "block_id", "slot", "row"))
"""Codes of a report."""

CODE, INDEX, POSITION, VALUE, LIMIT = map(REPORT_FIELDS.index, ("code", "index", "position", "value", "limit"))
"""Where its fields are."""

RAISE = "red.relaxed.gpu.global.max.s32"
PUBLISH = "st.release.sys.global.b64"


class Rows(NamedTuple):
    """The rows of block_table: as Arrays.block_table and Arrays.row_starts, with what is known of them.

    Attributes:
        table, stride: The entries, and from a row to the next.
        starts, step: The row starts, and from one to the next: 0 where there is one 0 for all.
        blocks: The entries of a row, where the row starts are one 0; else 0.
        num_entries: Of the table, where row starts are to be within them.
    """

    table: Buffer
    stride: Expr
    starts: Buffer
    step: Expr
    blocks: Expr
    num_entries: Expr

    def place(self, seq: Expr) -> Expr:
        """The row start of a sequence, int64 as seq is."""
        return T.Cast("int64", self.starts[seq * self.step])

    def start(self, seq: Expr) -> Expr:
        """Where in the table a sequence's row begins."""
        return seq * self.stride + self.place(seq)

    def most_tokens(self, seq: Expr, block_size: int) -> Expr:
        """Tokens that a sequence has blocks for."""
        blocks = T.Cast("int64", self.blocks) + self.place(seq + T.int64(1)) - self.place(seq)
        return T.min(blocks * T.int64(block_size), T.int64(affine.MAX_LENGTH))

    def is_wrong(self, seq: Expr) -> Expr:
        """Whether a row does not begin where it may, ends before it begins or beyond the table."""
        begin, end = self.place(seq), self.place(seq + T.int64(1))
        first = T.And(seq == T.int64(0), begin != T.int64(0))
        return T.Or(T.Or(first, begin < T.int64(0)), T.Or(end < begin, end > self.num_entries))


def cuda_check(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [batch] of CHECK_THREADS threads: context_lens and block_table, before cuda_decode.

    Entries of the table that name blocks of which no token is seen may be anything.
    """
    arrays, block_size = Arrays(spec), spec.block_size

    @T.prim_func
    def cuda_check(
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        status_handle: T.handle,
        table_seq: T.int64,
        row_step: T.int64,
        num_entries: T.int64,
        batch: T.int32,
        max_blocks: T.int32,
        num_blocks: T.int64,
    ):
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        rows = T.meta_var(Rows(block_table, table_seq, row_starts, row_step, max_blocks, num_entries))
        context_lens = arrays.context_lens(context_lens_handle)
        status = arrays.status(status_handle)
        T.device_entry()
        cta = T.cta_id([batch])
        warp_id = T.warp_id([CHECK_THREADS // WARP])
        lane_id = T.lane_id([WARP])
        thread: T.int32 = warp_id * WARP + lane_id
        seq: T.int32 = cta
        length: T.int64 = T.Cast("int64", context_lens[seq])
        row: T.int64 = rows.start(T.Cast("int64", seq))
        most: T.int64 = rows.most_tokens(T.Cast("int64", seq), block_size)
        if (length < T.int64(0)) | (length > most) | rows.is_wrong(T.Cast("int64", seq)):
            if thread == 0:
                T.ptx[RAISE](status.ptr_to([0]), VIOLATION - (2 * seq + BAD_LENGTH))
        else:
            end = T.meta_var(_end(spec, context_lens[seq], length))
            used: T.int32 = T.Cast("int32", T.truncdiv(end + T.int64(block_size - 1), T.int64(block_size)))
            first = T.meta_var(_first_block(spec, context_lens[seq]))
            for step in range(T.truncdiv(used - first + (CHECK_THREADS - 1), CHECK_THREADS)):
                i: T.int32 = first + step * CHECK_THREADS + thread
                if _is_seen(spec, i < used, context_lens[seq], i):
                    block: T.int32 = block_table[row + T.Cast("int64", i)]
                    if (block < 0) | (T.Cast("int64", block) >= num_blocks):
                        T.ptx[RAISE](status.ptr_to([0]), VIOLATION - (2 * seq + BAD_BLOCK))

    return cuda_check


def cuda_check_slots(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [ceil(num_tokens / CHECK_THREADS)] of CHECK_THREADS threads: slot_mapping, before cuda_append_kv.

    append_kv skips a token whose slot is -1.
    """
    arrays, block_size = Arrays(spec), spec.block_size

    @T.prim_func
    def cuda_check_slots(
        slot_mapping_handle: T.handle, status_handle: T.handle, num_tokens: T.int32, num_blocks: T.int64
    ):
        slot_mapping = arrays.slot_mapping(slot_mapping_handle)
        status = arrays.status(status_handle)
        T.device_entry()
        cta = T.cta_id([T.truncdiv(num_tokens + (CHECK_THREADS - 1), CHECK_THREADS)])
        warp_id = T.warp_id([CHECK_THREADS // WARP])
        lane_id = T.lane_id([WARP])
        token: T.int32 = cta * CHECK_THREADS + warp_id * WARP + lane_id
        if token < num_tokens:
            slot: T.int64 = slot_mapping[token]
            if (slot < T.int64(-1)) | (slot >= num_blocks * T.int64(block_size)):
                T.ptx[RAISE](status.ptr_to([0]), VIOLATION - (2 * token + BAD_SLOT))

    return cuda_check_slots


def report_indices(spec: PagedAttentionSpec) -> Callable[..., None]:
    """What cuda_check found, as a report: for one thread of a kernel that has seen a status other than 0."""
    block_size = spec.block_size

    @inline
    def stage(status, context_lens, rows, num_blocks, report):
        found: T.int32 = VIOLATION - status[0]
        seq: T.int64 = T.Cast("int64", T.truncdiv(found, 2))
        length: T.int64 = T.Cast("int64", context_lens[seq])
        code: T.int64 = T.int64(LENGTH_CODE)
        report[INDEX] = seq
        if rows.is_wrong(seq):
            code = T.int64(ROW_CODE)
            report[POSITION] = rows.place(seq)
            report[VALUE] = rows.place(seq + T.int64(1))
            report[LIMIT] = rows.num_entries
        elif T.truncmod(found, 2) == BAD_LENGTH:
            report[VALUE] = length
            report[LIMIT] = rows.most_tokens(seq, block_size)
        else:
            code = T.int64(BLOCK_CODE)
            first = T.meta_var(_first_block(spec, context_lens[seq]).astype("int64"))
            i: T.int64 = first
            row: T.int64 = rows.start(seq)
            block: T.int64 = T.Cast("int64", rows.table[row + first])
            while _passes(spec, (block >= T.int64(0)) & (block < num_blocks), context_lens[seq], i) & (
                (i + T.int64(1)) * T.int64(block_size) < length
            ):
                i = i + T.int64(1)
                block = T.Cast("int64", rows.table[row + i])
            report[POSITION] = i
            report[VALUE] = block
            report[LIMIT] = num_blocks
        T.ptx[PUBLISH](report.ptr_to([CODE]), code)

    return stage


def _first_block(spec: PagedAttentionSpec, length: Expr) -> Expr:
    """The entry of a sequence's row of block_table that is the first to be checked; int32."""
    return T.truncdiv(first_seen(spec, length), spec.block_size)


def _end(spec: PagedAttentionSpec, length: Expr, wide: Expr) -> Expr:
    """One past the last key that is seen, int64; wide is the length as int64."""
    end = limit(spec, length)
    return wide if end is length else end.astype("int64")


def _is_seen(spec: PagedAttentionSpec, in_row: Expr, length: Expr, block_idx: Expr) -> Expr:
    """Whether a block that is before the last that is seen is itself seen."""
    sees = sees_block(spec, length, block_idx)
    return in_row if sees is None else T.And(in_row, sees)


def _passes(spec: PagedAttentionSpec, is_good: Expr, length: Expr, block_idx: Expr) -> Expr:
    """Whether an entry, for a block_idx of int64, names a block that there is, or one that is not seen."""
    sees = sees_block(spec, length, block_idx.astype("int32"))
    return is_good if sees is None else T.Or(is_good, T.Not(sees))


def report_slots(spec: PagedAttentionSpec) -> Callable[..., None]:
    """What cuda_check_slots found, as a report, like report_indices."""
    block_size = spec.block_size

    @inline
    def stage(status, slot_mapping, num_blocks, report):
        token: T.int64 = T.Cast("int64", T.truncdiv(VIOLATION - status[0], 2))
        code: T.int64 = T.int64(SLOT_CODE)
        report[INDEX] = token
        report[VALUE] = slot_mapping[token]
        report[LIMIT] = num_blocks * T.int64(block_size)
        T.ptx[PUBLISH](report.ptr_to([CODE]), code)

    return stage
