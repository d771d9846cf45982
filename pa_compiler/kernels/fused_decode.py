"""The fused pipeline: the four stages as sblocks of one PrimFunc. Scores and probabilities never leave the core."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels import ahead, rows_in_place, state
from pa_compiler.kernels.arrays import Arrays, BlockTable, without
from pa_compiler.kernels.caches import Cache, key_access, key_copy_shape, load_tile
from pa_compiler.kernels.computed import allocate_visible, compute_columns, compute_visible
from pa_compiler.kernels.decode_rows import finish_rows, load_queries
from pa_compiler.kernels.fours import copied_values, of_copy
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.integers import allocate_units
from pa_compiler.kernels.load_query import query_shape
from pa_compiler.kernels.pv_in_place import update_in_place
from pa_compiler.kernels.pv_matmul import pv_update
from pa_compiler.kernels.qk_matmul import qk_matmul
from pa_compiler.kernels.rows import begins_late, first_of_range, first_seen, limit, masks_first_tile, rows_of_tiles
from pa_compiler.kernels.scales import Scales, look_up_scales, scales_of_head, unused, weigh_factors, weigh_values
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.scores import Scoring, Sequence
from pa_compiler.kernels.softmax import pair_probs, softmax_prepare
from pa_compiler.kernels.state import Factors, State
from pa_compiler.kernels.tokens import Tile, look_up_tokens
from pa_compiler.kernels.zero_points import allocate_sums, sum_zeros
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def fused_decode(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """One work item: num_seqs sequences from batch_start on, the blocks [block_begin, block_end), all heads.

    With partial_start < 0 the range is all that the sequences have: writes their out and lse. Otherwise writes the
    partial result of sequence batch_start + i to slot partial_start + i of partial_max, partial_sum and partial_acc. A
    sequence with no tokens in the range gives the empty result. The scale of scores is query_scale, a power of two up
    to 1, times score_scale. The caller has checked shapes, lengths and block ids. Arrays are as in Arrays.

    A tile of tokens is taken through all kv heads, and for each through all tiles of its query heads, before the next:
    the caches are read once, in the order in which a block lies in memory. In a sweep all of them go through each stage
    together. With spec.shared_kv the values are the keys' first elements: value_cache and its strides are not used.
    """
    arrays, kv_tile = Arrays(spec, tiling), tiling.kv_tile
    tiles, rows = spec.num_kv_heads * tiling.row_tiles(spec), tiling.row_tile
    dim, masks_first = spec.result_dim, masks_first_tile(spec, in_step=tiling.rows_in_place)
    look_up, attend = look_up_tokens(spec, tiling), _attend_heads(spec, tiling)
    load_stage, finish = load_queries(spec, tiling), finish_rows(spec, tiling)
    scales_stage = look_up_scales(spec, tiling)
    functions = ScoreFunctions(spec)
    columns_stage = compute_columns(functions, tiling)

    @script.prim_func(s_tir=True)
    def fused_decode(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        alibi_slopes_handle: T.handle,
        sinks_handle: T.handle,
        key_scale_handle: T.handle,
        value_scale_handle: T.handle,
        k_block: T.int64,
        k_row: T.int64,
        k_head: T.int64,
        v_block: T.int64,
        v_row: T.int64,
        v_head: T.int64,
        ks_block: T.int64,
        ks_row: T.int64,
        ks_head: T.int64,
        vs_block: T.int64,
        vs_row: T.int64,
        vs_head: T.int64,
        batch_start: T.int32,
        num_seqs: T.int32,
        block_begin: T.int32,
        block_end: T.int32,
        partial_start: T.int32,
        query_scale: T.float32,
        score_scale: T.float32,
    ):
        query = arrays.query(query_handle)
        key_cache = arrays.key_cache(key_cache_handle)
        value_cache = arrays.value_cache(value_cache_handle)
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        table = T.meta_var(BlockTable(block_table, row_starts))
        context_lens = arrays.context_lens(context_lens_handle)
        partial_max = arrays.partial_rows(partial_max_handle)
        partial_sum = arrays.partial_rows(partial_sum_handle)
        partial_acc = arrays.partial_acc(partial_acc_handle)
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        if spec.alibi:
            alibi_slopes = arrays.alibi_slopes(alibi_slopes_handle)
        if spec.sinks:
            sinks = arrays.sinks(sinks_handle)
        if spec.has_scales:
            key_scale = arrays.key_scale(key_scale_handle)
            value_scale = arrays.value_scale(value_scale_handle)
            scales = T.meta_var(Scales(
                Cache(key_scale, ks_block, ks_row, ks_head, None), Cache(value_scale, vs_block, vs_row, vs_head, None)
            ))  # fmt: skip
        of_functions = T.meta_var(arrays.of_functions(functions.arrays))
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                q_tile = T.sblock_alloc_buffer(query_shape(spec, tiling, tiles), tiling.keys.factor_dtype)
                row_max = T.sblock_alloc_buffer((tiles, rows), "float32")
                row_sum = T.sblock_alloc_buffer((tiles, rows), "float32")
                acc = T.sblock_alloc_buffer((tiles, rows, dim), "float32")
                sums = T.meta_var(allocate_sums(spec, "query_sums", tiles, rows))
                units = T.meta_var(allocate_units(tiling, "query_units", tiles))
                seq: T.let = batch_start + vs
                places: T.let = headroom(spec, context_lens[seq])
                end = T.meta_var(limit(spec, context_lens[seq]))
                if begins_late(spec):
                    seen: T.let = first_seen(spec, context_lens[seq])
                    range_begin: T.let = first_of_range(spec, tiling, block_begin, seen)
                else:
                    range_begin: T.let = block_begin * spec.block_size  # type: ignore[no-redef]
                range_len: T.let = T.max(T.min(block_end * spec.block_size, end) - range_begin, 0)
                # an empty range takes one step with valid_len == 0, which gives the empty result
                num_steps: T.let = T.max(T.ceildiv(range_len, kv_tile), 1)
                load_stage(query, q_tile, sums, seq, query_scale, units)
                for step in range(num_steps):
                    with T.sblock("kv_tile"):
                        vstep = T.axis.opaque(num_steps, step)
                        T.reads()
                        T.writes()
                        key_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                        if not spec.shared_kv:
                            value_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                        tile_start: T.let = range_begin + vstep * kv_tile
                        valid_len: T.let = T.min(range_len - vstep * kv_tile, kv_tile)
                        has_next: T.let = vstep < num_steps - 1
                        tile = T.meta_var(Tile(tiling, tile_start, valid_len, seen if masks_first else None))
                        keys = T.meta_var(Cache(key_cache, k_block, k_row, k_head, key_offsets))
                        values = T.meta_var(
                            keys if spec.shared_kv else Cache(value_cache, v_block, v_row, v_head, value_offsets)
                        )
                        first_token = T.meta_var(seen if begins_late(spec) and tiling.weight_sums else None)
                        look_up(table, keys, values, tile, seq, range_begin + range_len - 1, has_next, first_token)
                        last = T.meta_var(range_begin + range_len - 1)
                        given = T.meta_var(scales._replace(sums=sums, units=units) if spec.has_scales else None)
                        scales_of_tile = T.meta_var(scales_stage(given, table, tile, seq, last, first_token))
                        computed = T.meta_var(
                            columns_stage(of_functions, seq, context_lens[seq], tile, tile.num_groups)
                        )
                        attend(
                            q_tile, keys, values, tile, has_next, State(row_max, row_sum, acc, 0), vstep, num_steps,
                            Sequence(
                                seq, context_lens[seq] - 1, alibi_slopes if spec.alibi else None, score_scale, places,
                                computed, scales_of_tile,
                            ),
                        )  # fmt: skip
                finish(
                    State(row_max, row_sum, acc, 0), State(partial_max, partial_sum, partial_acc, partial_start + vs),
                    partial_start < 0, out, lse, seq, places,
                    sinks if spec.sinks else None,
                )  # fmt: skip

    return without(fused_decode, *unused(spec))


def _attend_heads(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """A tile of tokens through the four stages, kv head by kv head, or, in a sweep, all of them together."""
    head_steps = 1 if tiling.sweep else spec.num_kv_heads
    tile_steps = spec.num_kv_heads * tiling.row_tiles(spec) // (head_steps * tiling.pass_tiles(spec))
    key_copy, (value_copy, load_values) = key_copy_shape(spec, tiling), copied_values(spec, tiling)
    load_keys = load_tile(tiling, key_access(spec, tiling), tiling.keys, key_copy, "load_keys")
    announce_keys, announce_values = ahead.announce(ahead.KEYS), ahead.announce(ahead.VALUES)
    attend, k_dtype, v_dtype = _attend(spec, tiling), tiling.keys.factor_dtype, tiling.values.factor_dtype

    @script.inline
    def stage(q_tile, key_cache, value_cache, tile, has_next, running, step, num_steps, sequence):
        for kv_head in range(head_steps):
            with T.sblock("kv_head"):
                vkv = T.axis.spatial(head_steps, kv_head)
                T.reads()
                T.writes()
                # next: these tokens in the next kv head; after the last one, the next tokens in head 0
                is_last: T.let = vkv == head_steps - 1
                next_tile: T.let = T.Select(T.And(is_last, has_next), tiling.kv_tile, 0)
                next_head: T.let = T.Cast("int64", T.Select(is_last, 0, vkv + 1))
                if tiling.prefetches:
                    announce_keys(key_cache, next_tile, next_head * key_cache.head)
                    if not spec.shared_kv:
                        announce_values(value_cache, next_tile, next_head * value_cache.head)
                key_head: T.let = T.Cast("int64", vkv) * key_cache.head
                value_head: T.let = T.Cast("int64", vkv) * value_cache.head
                if tiling.copy_keys:
                    k_tile = T.sblock_alloc_buffer(key_copy, k_dtype)
                    load_keys(key_cache, k_tile, key_head, tile.num_groups)
                if tiling.copy_values:
                    v_tile = T.sblock_alloc_buffer(value_copy, v_dtype)
                    load_values(value_cache, v_tile, value_head, tile.num_groups)
                keys = T.meta_var(key_cache._replace(memory=k_tile) if tiling.copy_keys else key_cache)
                values, in_values = T.meta_var(
                    of_copy(value_cache, value_head, v_tile) if tiling.copy_values else (value_cache, value_head)
                )
                for group_tile in range(tile_steps):
                    with T.sblock("head_tile"):
                        vgt = T.axis.spatial(tile_steps, group_tile)
                        T.reads()
                        T.writes()
                        first: T.let = vkv * tile_steps + vgt
                        attend(
                            q_tile, first, keys, key_head, values, in_values, tile, running._replace(slot=first), step,
                            num_steps, sequence,
                        )  # fmt: skip

    return stage


def _attend(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The four stages for the head tiles that go from scores to outputs at once."""
    num_tiles, rows, tokens = tiling.pass_tiles(spec), tiling.row_tile, tiling.padded_kv_tile
    in_pairs, rows_of = tiling.values.terms > 1, rows_of_tiles(spec, tiling)
    update_stage = (update_in_place if tiling.value_pairs else pv_update)(spec, tiling)
    matmuls = qk_matmul(spec, tiling), pair_probs(tiling), update_stage
    qk_stage, pairs_stage, update_stage = rows_in_place.stages(spec, tiling) if tiling.rows_in_place else matmuls
    softmax_stage, rescale_stage = softmax_prepare(spec, tiling), state.rescale(rows)
    functions, row_tiles = ScoreFunctions(spec), tiling.row_tiles(spec)
    visible_stage, head_stage = compute_visible(functions, tiling), scales_of_head(spec, tiling)
    weigh_stage, factors_stage, zeros_stage = weigh_values(tiling), weigh_factors(rows), sum_zeros(tiling)
    of_tokens, of_tiles = spec.token_scales, tiling.scales_tiles(spec)

    @script.inline
    def stage(q_tile, first, keys, key_head, values, value_head, tile, running, step, num_steps, sequence):
        scores = T.sblock_alloc_buffer((num_tiles, rows, tokens), tiling.keys.sum_dtype)
        probs = T.sblock_alloc_buffer((num_tiles, rows, tokens), "float32")
        tile_max = T.sblock_alloc_buffer((num_tiles, rows), "float32")
        tile_sum = T.sblock_alloc_buffer((num_tiles, rows), "float32")
        alpha = T.sblock_alloc_buffer((num_tiles, rows), "float32")
        beta = T.sblock_alloc_buffer((num_tiles, rows), "float32")
        qk_stage(q_tile, first, keys, key_head, tile, scores, 0)
        if in_pairs:
            prob_pairs = T.sblock_alloc_buffer(rows_in_place.pairs_shape(tiling, num_tiles), "int32")
        if of_tokens:
            weighted = T.sblock_alloc_buffer((num_tiles, rows, tokens), "float32")
        weight_units = T.meta_var(allocate_units(tiling, "weight_units", num_tiles))
        if of_tiles:
            weighted_beta = T.sblock_alloc_buffer((num_tiles, rows), "float32")
        zeros = T.meta_var(allocate_sums(spec, "zero_sums", num_tiles, rows))
        lost = T.meta_var(allocate_sums(spec, "weight_lost", num_tiles, rows) if tiling.values.integers else None)
        exact = T.meta_var(weighted if of_tokens else probs)
        weights = T.meta_var(prob_pairs if in_pairs else exact)
        computed = T.meta_var(allocate_visible(functions, tiling, sequence.computed, num_tiles))
        for i in range(num_tiles):
            with T.sblock("softmax"):
                vslot = T.axis.spatial(num_tiles, i)
                T.reads()
                T.writes()
                added = T.meta_var(State(tile_max, tile_sum, None, vslot))
                of = T.meta_var(rows_of(sequence.seq, first + vslot))
                kv_head = T.meta_var(T.floordiv(first + vslot, row_tiles))
                of_head = T.meta_var(head_stage(sequence.scales, kv_head, tile, sequence.scale))
                of_keys = T.meta_var(of_head.of_slot(first + vslot))
                scoring = T.meta_var(Scoring(of, sequence.query_pos, sequence.slopes, computed, *of_keys))
                visible_stage(computed, of, vslot, tile.num_groups)
                softmax_stage(scores, probs, added, of_head.score, sequence.headroom, tile, tile.num_groups, scoring)
                weigh_stage(probs, weighted if of_tokens else None, of_head, vslot, tile.num_groups)
                if in_pairs:
                    pairs_stage(exact, weights, tile_sum, vslot, tile.num_groups, weight_units, lost)
                zeros_stage(probs, zeros, of_head, vslot, tile.num_groups, lost)
                rescale_stage(added, running._replace(slot=first + vslot), Factors(alpha, beta, vslot), step)
                factors_stage(Factors(alpha, beta, vslot), weighted_beta if of_tiles else None, of_head, weight_units)
        update_stage(
            weights, values, value_head, tile,
            Factors(alpha, weighted_beta if of_tiles else beta, 0, zeros, None if of_tiles else weight_units),
            running._replace(slot=first), step, num_steps, computed,
        )  # fmt: skip

    return stage
