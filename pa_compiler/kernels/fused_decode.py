"""The fused pipeline: the four stages as sblocks of one PrimFunc. Scores and probabilities never leave the core."""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.cache_access import cache_dtype, key_access, load_tile, token_offsets, value_access
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.online_update import fold, normalize, rescale, store_partial
from pa_compiler.kernels.pv_matmul import pv_matmul
from pa_compiler.kernels.qk_matmul import load_query, qk_matmul
from pa_compiler.kernels.softmax_prepare import pair_probs, softmax_prepare
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import Tiling


def fused_decode(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """One work item: num_seqs sequences from batch_start on, the blocks [block_begin, block_end), all heads.

    With partial_start < 0 the range is all that the sequences have: writes their out and lse. Otherwise writes the
    partial result of sequence batch_start + i to slot partial_start + i of partial_max, partial_sum (float32
    [slots, num_heads]) and partial_acc (float32 [slots, num_heads, head_dim]). A sequence with no tokens in the range
    gives the empty result. The scale of scores is query_scale, a power of two up to 1, times score_scale. The caller
    has checked shapes, lengths and block ids.

    A tile of tokens is taken through all kv heads, and for each through all tiles of its query heads, before the next:
    the caches are read once, in the order in which a block lies in memory. In a sweep all of them go through each stage
    together.
    """
    heads, head_dim = T.int64(spec.num_heads), T.int64(spec.head_dim)
    kv_heads, group, dtype = spec.num_kv_heads, spec.group, spec.dtype
    out_dtype = spec.result_dtype
    itemsize, out_itemsize = ITEMSIZES[dtype], ITEMSIZES[out_dtype]
    rows, kv_tile, tokens = tiling.row_tile, tiling.kv_tile, tiling.padded_kv_tile
    group_tiles = tiling.row_tiles(spec)
    tiles, pass_tiles = kv_heads * group_tiles, tiling.pass_tiles(spec)
    head_steps = 1 if tiling.sweep else kv_heads
    tile_steps = tiles // (head_steps * pass_tiles)
    factor, pair = "int32" if tiling.dot_pairs else "float32", tiling.dot_elements

    load_query_stage = load_query(spec, tiling)
    keys_in_cache, values_in_cache = key_access(spec, tiling), value_access(spec, tiling)
    key_offsets_stage = token_offsets(spec, tiling, keys_in_cache)
    value_offsets_stage = token_offsets(spec, tiling, values_in_cache)
    load_keys_stage = load_tile(spec, tiling, keys_in_cache, "load_keys")
    load_values_stage = load_tile(spec, tiling, values_in_cache, "load_values")
    qk_stage = qk_matmul(spec, tiling)
    softmax_stage = softmax_prepare(spec, tiling)
    pairs_stage = pair_probs(tiling)
    pv_stage = pv_matmul(spec, tiling)
    rescale_stage, fold_stage = rescale(rows), fold(pass_tiles, rows, spec.head_dim)
    store_stage = store_partial(rows, spec.head_dim)
    normalize_stage = normalize(spec, rows)

    def rows_of_tile(row_start: Expr) -> Expr | int:
        """Query heads in the tile that begins at this row of its group."""
        return rows if group % rows == 0 else T.min(group - row_start, rows)

    @script.prim_func(s_tir=True)
    def fused_decode(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        k_block: T.int64,
        k_row: T.int64,
        k_head: T.int64,
        v_block: T.int64,
        v_row: T.int64,
        v_head: T.int64,
        batch_start: T.int32,
        num_seqs: T.int32,
        block_begin: T.int32,
        block_end: T.int32,
        partial_start: T.int32,
        query_scale: T.float32,
        score_scale: T.float32,
    ):
        batch, max_blocks, slots, k_span, v_span = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        q_batch, q_head, table_seq = T.int64(), T.int64(), T.int64()
        out_batch, out_head, lse_batch = T.int64(), T.int64(), T.int64()
        query = T.match_buffer(
            query_handle, (batch, heads, head_dim), dtype, strides=[q_batch, q_head, T.int64(1)], align=itemsize,

        )  # fmt: skip
        key_cache = T.match_buffer(key_cache_handle, (k_span,), cache_dtype(spec, tiling), align=itemsize)
        value_cache = T.match_buffer(value_cache_handle, (v_span,), cache_dtype(spec, tiling), align=itemsize)
        block_table = T.match_buffer(
            block_table_handle, (batch, max_blocks), "int32", strides=[table_seq, T.int64(1)], align=4
        )
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        partial_max = T.match_buffer(partial_max_handle, (slots, heads), "float32", align=4)
        partial_sum = T.match_buffer(partial_sum_handle, (slots, heads), "float32", align=4)
        partial_acc = T.match_buffer(partial_acc_handle, (slots, heads, head_dim), "float32", align=4)
        out = T.match_buffer(
            out_handle, (batch, heads, head_dim), out_dtype, strides=[out_batch, out_head, T.int64(1)],
            align=out_itemsize,
        )  # fmt: skip
        lse = T.match_buffer(lse_handle, (batch, heads), "float32", strides=[lse_batch, T.int64(1)], align=4)
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                q_tile = T.sblock_alloc_buffer((tiles, rows, spec.head_dim // pair), factor)
                row_max = T.sblock_alloc_buffer((tiles, rows), "float32")
                row_sum = T.sblock_alloc_buffer((tiles, rows), "float32")
                acc = T.sblock_alloc_buffer((tiles, rows, spec.head_dim), "float32")
                seq: T.let = batch_start + vs
                places: T.let = headroom(spec, context_lens[seq])
                range_begin: T.let = block_begin * spec.block_size
                range_len: T.let = T.max(T.min(block_end * spec.block_size, context_lens[seq]) - range_begin, 0)
                # an empty range takes one step with valid_len == 0, which gives the empty result
                num_steps: T.let = T.max(T.ceildiv(range_len, kv_tile), 1)
                for tile in range(tiles):
                    with T.sblock("query_tile"):
                        vtile = T.axis.spatial(tiles, tile)
                        T.reads()
                        T.writes()
                        row_start: T.let = T.floormod(vtile, group_tiles) * rows
                        head_start: T.let = T.floordiv(vtile, group_tiles) * group + row_start
                        load_query_stage(query, q_tile, seq, vtile, head_start, rows_of_tile(row_start), query_scale)
                for step in range(num_steps):
                    with T.sblock("kv_tile"):
                        vstep = T.axis.opaque(num_steps, step)
                        T.reads()
                        T.writes()
                        key_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                        value_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                        tile_start: T.let = range_begin + vstep * kv_tile
                        valid_len: T.let = T.min(range_len - vstep * kv_tile, kv_tile)
                        last_token: T.let = range_begin + range_len - 1
                        num_groups: T.let = T.ceildiv(valid_len, tiling.token_group)
                        has_next: T.let = vstep < num_steps - 1
                        num_offsets: T.let = T.Select(has_next, tiling.num_offsets, num_groups * tiling.token_group)
                        key_offsets_stage(
                            block_table, key_offsets, seq, tile_start, last_token, num_offsets, k_block, k_row
                        )
                        value_offsets_stage(
                            block_table, value_offsets, seq, tile_start, last_token, num_offsets, v_block, v_row
                        )
                        for kv_head in range(head_steps):
                            with T.sblock("kv_head"):
                                vkv = T.axis.spatial(head_steps, kv_head)
                                T.reads()
                                T.writes()
                                k_tile = T.sblock_alloc_buffer(tiling.copy_shape(spec, tiling.copy_keys), factor)
                                v_tile = T.sblock_alloc_buffer(tiling.copy_shape(spec, tiling.copy_values), factor)
                                # next: these tokens in the next kv head; after the last one, the next tokens in head 0
                                is_last: T.let = vkv == head_steps - 1
                                ahead_t: T.let = T.Select(T.And(is_last, has_next), kv_tile, 0)
                                ahead_head: T.let = T.Cast("int64", T.Select(is_last, 0, vkv + 1))
                                k_now: T.let = T.Cast("int64", vkv) * k_head
                                v_now: T.let = T.Cast("int64", vkv) * v_head
                                if tiling.copy_keys:
                                    load_keys_stage(key_cache, key_offsets, k_tile, k_now, k_row, num_groups)
                                if tiling.copy_values:
                                    load_values_stage(value_cache, value_offsets, v_tile, v_now, v_row, num_groups)
                                keys = T.meta_var(k_tile if tiling.copy_keys else key_cache)
                                values = T.meta_var(v_tile if tiling.copy_values else value_cache)
                                for group_tile in range(tile_steps):
                                    with T.sblock("head_tile"):
                                        vgt = T.axis.spatial(tile_steps, group_tile)
                                        T.reads()
                                        T.writes()
                                        scores = T.sblock_alloc_buffer((pass_tiles, rows, tokens), "float32")
                                        probs = T.sblock_alloc_buffer((pass_tiles, rows, tokens), "float32")
                                        tile_max = T.sblock_alloc_buffer((pass_tiles, rows), "float32")
                                        tile_sum = T.sblock_alloc_buffer((pass_tiles, rows), "float32")
                                        alpha = T.sblock_alloc_buffer((pass_tiles, rows), "float32")
                                        beta = T.sblock_alloc_buffer((pass_tiles, rows), "float32")
                                        first_tile: T.let = vkv * group_tiles + vgt
                                        qk_stage(
                                            q_tile, keys, key_cache, key_offsets, scores, first_tile, 0, k_now, k_head,
                                            k_row, ahead_t, ahead_head * k_head, valid_len,
                                        )  # fmt: skip
                                        if tiling.dot_pairs:
                                            prob_pairs = T.sblock_alloc_buffer((pass_tiles, rows, tokens // 2), "int32")
                                        for tile in range(pass_tiles):
                                            with T.sblock("softmax"):
                                                vslot = T.axis.spatial(pass_tiles, tile)
                                                T.reads()
                                                T.writes()
                                                softmax_stage(
                                                    scores, probs, tile_max, tile_sum, vslot, score_scale, places,
                                                    valid_len, num_groups,
                                                )  # fmt: skip
                                                if tiling.dot_pairs:
                                                    pairs_stage(probs, prob_pairs, vslot, num_groups)
                                                rescale_stage(
                                                    tile_max, tile_sum, vslot, row_max, row_sum, first_tile + vslot,
                                                    alpha, beta, vslot, vstep,
                                                )  # fmt: skip
                                        weights = T.meta_var(prob_pairs if tiling.dot_pairs else probs)
                                        num_full: T.let = T.floordiv(valid_len, tiling.token_group)
                                        with T.sblock("pv_update"):
                                            T.reads()
                                            T.writes()
                                            tile_acc = T.sblock_alloc_buffer(
                                                (pass_tiles, rows, spec.head_dim), "float32"
                                            )
                                            pv_stage(
                                                weights, values, value_cache, value_offsets, tile_acc, 0, v_now,
                                                v_head, v_row, ahead_t, ahead_head * v_head, valid_len, num_full,
                                            )  # fmt: skip
                                            fold_stage(tile_acc, 0, alpha, beta, acc, first_tile, vstep, num_steps)
                for tile in range(tiles):
                    with T.sblock("result"):
                        vtile = T.axis.spatial(tiles, tile)
                        T.reads()
                        T.writes()
                        first_row: T.let = T.floormod(vtile, group_tiles) * rows
                        first_head: T.let = T.floordiv(vtile, group_tiles) * group + first_row
                        num_rows = T.meta_var(rows_of_tile(first_row))
                        if partial_start < 0:
                            normalize_stage(row_max, row_sum, acc, vtile, out, lse, seq, first_head, num_rows, places)
                        else:
                            store_stage(
                                row_max, row_sum, acc, vtile, partial_max, partial_sum, partial_acc,
                                partial_start + vs, first_head, num_rows,
                            )  # fmt: skip

    return fused_decode
