"""The fused pipeline: the four stages as sblocks of one PrimFunc. Scores and probabilities never leave the core."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.kernels.online_update import online_update
from pa_compiler.kernels.pv_matmul import pv_matmul
from pa_compiler.kernels.qk_matmul import load_query, qk_matmul
from pa_compiler.kernels.softmax_prepare import softmax_prepare
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiling import Tiling


def fused_decode(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """One work item: num_seqs sequences from batch_start on, one head tile, the blocks [block_begin, block_end).

    Writes the partial result of sequence batch_start + i to slot partial_start + i of partial_max, partial_sum
    (float32 [slots, row_tile]) and partial_acc (float32 [slots, head_dim, row_tile]). A sequence with no tokens in the
    range gives the empty result. The caller has checked shapes, lengths and block ids.

    The caches are always seen as [num_blocks, block_size, num_kv_heads, head_dim]: strides are free, so HND is the same
    kernel on a transposed view.
    """
    heads, kv_heads, head_dim = T.int64(spec.num_heads), T.int64(spec.num_kv_heads), T.int64(spec.head_dim)
    block_size, dtype = spec.block_size, spec.dtype
    itemsize = ITEMSIZES[dtype]
    rows, kv_tile, tokens = tiling.row_tile, tiling.kv_tile, tiling.padded_kv_tile

    load_query_stage = load_query(spec, tiling)
    qk_stage = qk_matmul(spec, tiling)
    softmax_stage = softmax_prepare(spec, tiling)
    pv_stage = pv_matmul(spec, tiling)
    update_stage = online_update(spec, tiling)

    @T.prim_func(s_tir=True)
    def fused_decode(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        batch_start: T.int32,
        num_seqs: T.int32,
        kv_head: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
        block_begin: T.int32,
        block_end: T.int32,
        partial_start: T.int32,
        scale: T.float32,
    ):
        batch, num_blocks, max_blocks, slots = T.int64(), T.int64(), T.int64(), T.int64()
        q_batch, q_head, table_seq = T.int64(), T.int64(), T.int64()
        k_block, k_slot, k_head = T.int64(), T.int64(), T.int64()
        v_block, v_slot, v_head = T.int64(), T.int64(), T.int64()
        query = T.match_buffer(
            query_handle, (batch, heads, head_dim), dtype, strides=[q_batch, q_head, T.int64(1)], align=itemsize,

        )  # fmt: skip
        key_cache = T.match_buffer(
            key_cache_handle, (num_blocks, T.int64(block_size), kv_heads, head_dim), dtype,
            strides=[k_block, k_slot, k_head, T.int64(1)], align=itemsize,
        )  # fmt: skip
        value_cache = T.match_buffer(
            value_cache_handle, (num_blocks, T.int64(block_size), kv_heads, head_dim), dtype,
            strides=[v_block, v_slot, v_head, T.int64(1)], align=itemsize,
        )  # fmt: skip
        block_table = T.match_buffer(
            block_table_handle, (batch, max_blocks), "int32", strides=[table_seq, T.int64(1)], align=4
        )
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        partial_max = T.match_buffer(partial_max_handle, (slots, T.int64(rows)), "float32")
        partial_sum = T.match_buffer(partial_sum_handle, (slots, T.int64(rows)), "float32")
        partial_acc = T.match_buffer(partial_acc_handle, (slots, head_dim, T.int64(rows)), "float32")
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                q_tile = T.sblock_alloc_buffer((spec.head_dim, rows), "float32")
                row_max = T.sblock_alloc_buffer((1, rows), "float32")
                row_sum = T.sblock_alloc_buffer((1, rows), "float32")
                acc = T.sblock_alloc_buffer((1, spec.head_dim, rows), "float32")
                seq: T.let = batch_start + vs
                range_begin: T.let = block_begin * block_size
                range_len: T.let = T.max(T.min(block_end * block_size, context_lens[seq]) - range_begin, 0)
                # an empty range takes one step with valid_len == 0, which gives the empty result
                num_steps: T.let = T.max(T.ceildiv(range_len, kv_tile), 1)
                load_query_stage(query, q_tile, seq, head_start, num_rows)
                for step in range(num_steps):
                    with T.sblock("kv_tile"):
                        vstep = T.axis.opaque(num_steps, step)
                        T.reads()
                        T.writes()
                        scores = T.sblock_alloc_buffer((1, tokens, rows), "float32")
                        probs = T.sblock_alloc_buffer((1, tokens, rows), "float32")
                        tile_max = T.sblock_alloc_buffer((1, rows), "float32")
                        tile_sum = T.sblock_alloc_buffer((1, rows), "float32")
                        tile_acc = T.sblock_alloc_buffer((1, spec.head_dim, rows), "float32")
                        tile_start: T.let = range_begin + vstep * kv_tile
                        valid_len: T.let = T.min(range_len - vstep * kv_tile, kv_tile)
                        num_groups: T.let = T.ceildiv(valid_len, tiling.token_group)
                        qk_stage(key_cache, block_table, q_tile, scores, seq, 0, kv_head, tile_start, valid_len)
                        softmax_stage(scores, probs, tile_max, tile_sum, 0, scale, valid_len, num_groups)
                        pv_stage(value_cache, block_table, probs, tile_acc, seq, 0, kv_head, tile_start, valid_len)
                        update_stage(tile_max, tile_sum, tile_acc, 0, row_max, row_sum, acc, 0, vstep, num_steps)
                with T.sblock("store_partial"):
                    T.reads(row_max[0, 0:rows], row_sum[0, 0:rows], acc[0, 0:head_dim, 0:rows])
                    T.writes(
                        partial_max[partial_start + vs, 0:rows],
                        partial_sum[partial_start + vs, 0:rows],
                        partial_acc[partial_start + vs, 0:head_dim, 0:rows],
                    )
                    for r in range(rows):
                        with T.sblock("store_row"):
                            vr = T.axis.spatial(rows, r)
                            partial_max[partial_start + vs, vr] = row_max[0, vr]
                            partial_sum[partial_start + vs, vr] = row_sum[0, vr]
                    for d, r in T.grid(spec.head_dim, rows):
                        with T.sblock("store_acc"):
                            vr, vd = T.axis.remap("SS", [r, d])
                            partial_acc[partial_start + vs, vd, vr] = acc[0, vd, vr]

    return fused_decode
