"""The staged pipeline: the four stages as PrimFuncs that the host drives block by block as the seed does, and the end.

Each takes the sequences [batch_start, batch_start + num_seqs) of one chunk at once. The intermediates are float32 and
indexed by the position in the chunk: scores and probs [batch_chunk, row_tile, tokens]; tile_max, tile_sum, row_max and
row_sum [batch_chunk, row_tile]; tile_acc and acc [batch_chunk, row_tile, head_dim]. tokens is block_size padded to
whole token groups. A sequence that has ended takes part with valid_len == 0 and reads nothing.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels import online_update as update
from pa_compiler.kernels import pv_matmul as pv
from pa_compiler.kernels import qk_matmul as qk
from pa_compiler.kernels import softmax_prepare as softmax
from pa_compiler.kernels.cache_access import cache_dtype, key_access, token_offsets, value_access
from pa_compiler.kernels.headroom import headroom
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import Tiling


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """scores of block block_idx of every sequence of the chunk, for the heads [head_start, head_start + num_rows).

    As the queries are with query_scale (qk_matmul.load_query).
    """
    heads, head_dim = T.int64(spec.num_heads), T.int64(spec.head_dim)
    block_size, dtype, chunk = spec.block_size, spec.dtype, spec.batch_chunk
    itemsize = ITEMSIZES[dtype]
    rows, tokens = tiling.row_tile, tiling.padded_kv_tile
    load_query_stage = qk.load_query(spec, tiling)
    offsets_stage = token_offsets(spec, tiling, key_access(spec, tiling))
    qk_stage = qk.qk_matmul(spec, tiling)

    @script.prim_func(s_tir=True)
    def qk_matmul(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        scores_handle: T.handle,
        k_block: T.int64,
        k_row: T.int64,
        k_head: T.int64,
        batch_start: T.int32,
        num_seqs: T.int32,
        kv_head: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
        block_idx: T.int32,
        query_scale: T.float32,
    ):
        batch, max_blocks, k_span = T.int64(), T.int64(), T.int64()
        q_batch, q_head, table_seq = T.int64(), T.int64(), T.int64()
        query = T.match_buffer(
            query_handle, (batch, heads, head_dim), dtype, strides=[q_batch, q_head, T.int64(1)], align=itemsize,

        )  # fmt: skip
        key_cache = T.match_buffer(key_cache_handle, (k_span,), cache_dtype(spec, tiling), align=itemsize)
        block_table = T.match_buffer(
            block_table_handle, (batch, max_blocks), "int32", strides=[table_seq, T.int64(1)], align=4
        )
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        scores = T.match_buffer(scores_handle, (chunk, rows, tokens), "float32")
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                q_tile = T.sblock_alloc_buffer((1, rows, spec.head_dim), "float32")
                key_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                seq: T.let = batch_start + vs
                tile_start: T.let = block_idx * block_size
                valid_len: T.let = T.max(T.min(context_lens[seq] - tile_start, block_size), 0)
                head_offset: T.let = T.Cast("int64", kv_head) * k_head
                num_offsets: T.let = T.ceildiv(valid_len, tiling.token_group) * tiling.token_group
                load_query_stage(query, q_tile, seq, 0, head_start, num_rows, query_scale)
                offsets_stage(
                    block_table, key_offsets, seq, tile_start, tile_start + valid_len - 1, num_offsets, k_block, k_row
                )
                qk_stage(
                    q_tile, key_cache, key_cache, key_offsets, scores, 0, vs, head_offset, k_head,
                    k_row, 0, head_offset, valid_len,
                )  # fmt: skip

    return qk_matmul


def softmax_prepare(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """probs, tile_max and tile_sum of block block_idx, every column of probs written."""
    chunk, block_size = spec.batch_chunk, spec.block_size
    rows, tokens = tiling.row_tile, tiling.padded_kv_tile
    softmax_stage = softmax.softmax_prepare(spec, tiling)

    @script.prim_func(s_tir=True)
    def softmax_prepare(
        context_lens_handle: T.handle,
        scores_handle: T.handle,
        probs_handle: T.handle,
        tile_max_handle: T.handle,
        tile_sum_handle: T.handle,
        batch_start: T.int32,
        num_seqs: T.int32,
        block_idx: T.int32,
        score_scale: T.float32,
    ):
        batch = T.int64()
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        scores = T.match_buffer(scores_handle, (chunk, rows, tokens), "float32")
        probs = T.match_buffer(probs_handle, (chunk, rows, tokens), "float32")
        tile_max = T.match_buffer(tile_max_handle, (chunk, rows), "float32")
        tile_sum = T.match_buffer(tile_sum_handle, (chunk, rows), "float32")
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                context_len: T.let = context_lens[batch_start + vs]
                valid_len: T.let = T.max(T.min(context_len - block_idx * block_size, block_size), 0)
                softmax_stage(
                    scores, probs, tile_max, tile_sum, vs, score_scale, headroom(spec, context_len), valid_len,
                    tokens // tiling.token_group,
                )  # fmt: skip

    return softmax_prepare


def pv_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """tile_acc of block block_idx of every sequence of the chunk."""
    block_size, dtype, chunk = spec.block_size, spec.dtype, spec.batch_chunk
    itemsize = ITEMSIZES[dtype]
    rows, tokens = tiling.row_tile, tiling.padded_kv_tile
    offsets_stage = token_offsets(spec, tiling, value_access(spec, tiling))
    pv_stage = pv.pv_matmul(spec, tiling)

    @script.prim_func(s_tir=True)
    def pv_matmul(
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        probs_handle: T.handle,
        tile_acc_handle: T.handle,
        v_block: T.int64,
        v_row: T.int64,
        v_head: T.int64,
        batch_start: T.int32,
        num_seqs: T.int32,
        kv_head: T.int32,
        block_idx: T.int32,
    ):
        batch, max_blocks, v_span, table_seq = T.int64(), T.int64(), T.int64(), T.int64()
        value_cache = T.match_buffer(value_cache_handle, (v_span,), cache_dtype(spec, tiling), align=itemsize)
        block_table = T.match_buffer(
            block_table_handle, (batch, max_blocks), "int32", strides=[table_seq, T.int64(1)], align=4
        )
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        probs = T.match_buffer(probs_handle, (chunk, rows, tokens), "float32")
        tile_acc = T.match_buffer(tile_acc_handle, (chunk, rows, spec.head_dim), "float32")
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                value_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                seq: T.let = batch_start + vs
                tile_start: T.let = block_idx * block_size
                valid_len: T.let = T.max(T.min(context_lens[seq] - tile_start, block_size), 0)
                head_offset: T.let = T.Cast("int64", kv_head) * v_head
                num_offsets: T.let = T.ceildiv(valid_len, tiling.token_group) * tiling.token_group
                offsets_stage(
                    block_table,
                    value_offsets,
                    seq,
                    tile_start,
                    tile_start + valid_len - 1,
                    num_offsets,
                    v_block,
                    v_row,
                )
                num_full: T.let = T.floordiv(valid_len, tiling.token_group)
                with T.sblock("pv_matmul"):
                    T.reads()
                    T.writes()
                    pv_stage(
                        probs, value_cache, value_cache, value_offsets, tile_acc, vs, head_offset, v_head,
                        v_row, 0, head_offset, valid_len, num_full,
                    )  # fmt: skip

    return pv_matmul


def online_update(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """Fold tile_max, tile_sum, tile_acc of block block_idx into row_max, row_sum, acc, one slot for each sequence."""
    chunk, rows, head_dim = spec.batch_chunk, tiling.row_tile, spec.head_dim
    update_stage = update.online_update(rows, head_dim)

    @script.prim_func(s_tir=True)
    def online_update(
        tile_max_handle: T.handle,
        tile_sum_handle: T.handle,
        tile_acc_handle: T.handle,
        row_max_handle: T.handle,
        row_sum_handle: T.handle,
        acc_handle: T.handle,
        num_seqs: T.int32,
        block_idx: T.int32,
        num_steps: T.int32,
    ):
        tile_max = T.match_buffer(tile_max_handle, (chunk, rows), "float32")
        tile_sum = T.match_buffer(tile_sum_handle, (chunk, rows), "float32")
        tile_acc = T.match_buffer(tile_acc_handle, (chunk, rows, head_dim), "float32")
        row_max = T.match_buffer(row_max_handle, (chunk, rows), "float32")
        row_sum = T.match_buffer(row_sum_handle, (chunk, rows), "float32")
        acc = T.match_buffer(acc_handle, (chunk, rows, head_dim), "float32")
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                update_stage(tile_max, tile_sum, tile_acc, vs, row_max, row_sum, acc, vs, block_idx, num_steps)

    return online_update


def normalize(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """out and lse of every sequence of the chunk, for the heads [head_start, head_start + num_rows)."""
    heads, head_dim = T.int64(spec.num_heads), T.int64(spec.head_dim)
    chunk, rows, out_dtype = spec.batch_chunk, tiling.row_tile, spec.result_dtype
    itemsize = ITEMSIZES[out_dtype]
    normalize_stage = update.normalize(spec, rows)

    @script.prim_func(s_tir=True)
    def normalize(
        context_lens_handle: T.handle,
        row_max_handle: T.handle,
        row_sum_handle: T.handle,
        acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        batch_start: T.int32,
        num_seqs: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
    ):
        batch, out_batch, out_head, lse_batch = T.int64(), T.int64(), T.int64(), T.int64()
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        row_max = T.match_buffer(row_max_handle, (chunk, rows), "float32")
        row_sum = T.match_buffer(row_sum_handle, (chunk, rows), "float32")
        acc = T.match_buffer(acc_handle, (chunk, rows, spec.head_dim), "float32")
        out = T.match_buffer(
            out_handle, (batch, heads, head_dim), out_dtype, strides=[out_batch, out_head, T.int64(1)], align=itemsize,

        )  # fmt: skip
        lse = T.match_buffer(lse_handle, (batch, heads), "float32", strides=[lse_batch, T.int64(1)], align=4)
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                seq: T.let = batch_start + vs
                places: T.let = headroom(spec, context_lens[seq])
                normalize_stage(row_max, row_sum, acc, vs, out, lse, seq, head_start, num_rows, places)

    return normalize
