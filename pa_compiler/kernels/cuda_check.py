"""Checks of indices on the GPU, for check="device": a status word says what was wrong, and nothing waits for it.

The word is 0 where all is well. Otherwise it is VIOLATION - (2 * position + kind), of the lowest position that is
wrong: kernels that find a word other than 0 leave everything as it is. It stays until the host sets it to 0.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda_tiling import CHECK_THREADS, WARP
from pa_compiler.spec import PagedAttentionSpec

VIOLATION = 0x7FFFFFFF

BAD_LENGTH, BAD_BLOCK = 0, 1
"""Kinds, where the position is a sequence: its context_len is outside [0, max_blocks * block_size], or it names a block
outside [0, num_blocks) for one of its tokens."""

BAD_SLOT = 0
"""Kind, where the position is a token: its slot is not below num_blocks * block_size."""

_RAISE = "red.relaxed.gpu.global.max.s32"


def cuda_check(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [batch] of CHECK_THREADS threads: context_lens and block_table, before cuda_decode.

    block_table: int32 span of [batch, max_blocks] with stride table_seq. context_lens: int32 [batch]. Entries of the
    table past a sequence's last token may be anything.
    """
    block_size = spec.block_size

    @T.prim_func
    def cuda_check(
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        status_handle: T.handle,
        table_seq: T.int64,
        batch: T.int32,
        max_blocks: T.int32,
        num_blocks: T.int64,
    ):
        table_span, length_span, status_span = T.int64(), T.int64(), T.int64()
        block_table = T.match_buffer(block_table_handle, (table_span,), "int32")
        context_lens = T.match_buffer(context_lens_handle, (length_span,), "int32")
        status = T.match_buffer(status_handle, (status_span,), "int32")
        T.device_entry()
        cta = T.cta_id([batch])
        warp_id = T.warp_id([CHECK_THREADS // WARP])
        lane_id = T.lane_id([WARP])
        thread: T.int32 = warp_id * WARP + lane_id
        seq: T.int32 = cta
        length: T.int64 = T.Cast("int64", context_lens[seq])
        if (length < T.int64(0)) | (length > T.Cast("int64", max_blocks) * T.int64(block_size)):
            if thread == 0:
                T.ptx[_RAISE](status.ptr_to([0]), VIOLATION - (2 * seq + BAD_LENGTH))
        else:
            used: T.int32 = T.Cast("int32", T.truncdiv(length + T.int64(block_size - 1), T.int64(block_size)))
            for step in range(T.truncdiv(used + (CHECK_THREADS - 1), CHECK_THREADS)):
                i: T.int32 = step * CHECK_THREADS + thread
                if i < used:
                    block: T.int32 = block_table[T.Cast("int64", seq) * table_seq + T.Cast("int64", i)]
                    if (block < 0) | (T.Cast("int64", block) >= num_blocks):
                        T.ptx[_RAISE](status.ptr_to([0]), VIOLATION - (2 * seq + BAD_BLOCK))

    return cuda_check


def cuda_check_slots(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [ceil(num_tokens / CHECK_THREADS)] of CHECK_THREADS threads: slot_mapping, before cuda_append_kv.

    slot_mapping: int64 [num_tokens]; negative slots are skipped by append_kv, and are well.
    """
    block_size = spec.block_size

    @T.prim_func
    def cuda_check_slots(
        slot_mapping_handle: T.handle, status_handle: T.handle, num_tokens: T.int32, num_blocks: T.int64
    ):
        slot_span, status_span = T.int64(), T.int64()
        slot_mapping = T.match_buffer(slot_mapping_handle, (slot_span,), "int64")
        status = T.match_buffer(status_handle, (status_span,), "int32")
        T.device_entry()
        cta = T.cta_id([T.truncdiv(num_tokens + (CHECK_THREADS - 1), CHECK_THREADS)])
        warp_id = T.warp_id([CHECK_THREADS // WARP])
        lane_id = T.lane_id([WARP])
        token: T.int32 = cta * CHECK_THREADS + warp_id * WARP + lane_id
        if token < num_tokens:
            slot: T.int64 = slot_mapping[token]
            if slot >= num_blocks * T.int64(block_size):
                T.ptx[_RAISE](status.ptr_to([0]), VIOLATION - (2 * token + BAD_SLOT))

    return cuda_check_slots
