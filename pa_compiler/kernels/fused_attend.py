"""Several query tokens of a sequence at once: the stages of fused_decode over rows that are pairs of token and head."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels import ahead, state
from pa_compiler.kernels.arrays import Arrays, BlockTable, without
from pa_compiler.kernels.attend_rows import Item, attend_rows, finish_item
from pa_compiler.kernels.attend_start import start_rows
from pa_compiler.kernels.caches import Cache, copy_shape, key_access, key_copy_shape, load_tile, value_access
from pa_compiler.kernels.computed import compute_columns
from pa_compiler.kernels.integers import allocate_units
from pa_compiler.kernels.pv_whole import load_whole
from pa_compiler.kernels.rows import begins_late
from pa_compiler.kernels.scales import Scales, look_up_scales, scales_of_head, unused
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.sight import LIMIT, Bounds, Tree, find_runs
from pa_compiler.kernels.state import State
from pa_compiler.kernels.tokens import Tile, token_offsets
from pa_compiler.kernels.zero_points import allocate_sums
from pa_compiler.key_ranges import attend_range_blocks, attend_tiles, decodes_in_step
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def fused_attend(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """One work item: num_query query tokens of a sequence, in num_kv_heads kv heads, over the blocks of its range.

    The query tokens are those from token_begin on in query and out; token_positions has where in its sequence each of
    them is. With causal, the one at position p sees keys 0 to p, otherwise all context_len keys of sequence seq; in
    both cases within the window and the mask of the spec. With tree_start >= 0 it sees all keys before the tree_size
    last tokens of its sequence, and of these what its row of tree_mask says, which for the item's first token begins at
    tree_start, and for each other one tree_size further. Of a prefix that sequences share, seq is its row in
    block_table and context_lens, and the query tokens are those of several sequences, all after it.

    The item has num_kv_heads * ceil(num_query * group / row_tile) <= attend_tiles tiles of rows. Its keys are those of
    the blocks [block_begin, block_end). With partial_start < 0 these are all that its tokens see: writes their out and
    lse. Otherwise it writes the partial results of its heads to the slots from partial_start on, one for each token.

    From block_begin on, each attend_range_blocks blocks are a range. A range begins with an empty state, and the states
    of ranges are merged in their order, here or in merge_partials: so what a token gets depends on neither. Tiles of
    tokens begin at multiples of kv_tile from there on.
    """
    arrays, kv_tile, rows = Arrays(spec, tiling), tiling.kv_tile, tiling.row_tile
    tiles, depth, dim = attend_tiles(spec, rows), spec.head_dim // tiling.keys.terms, spec.result_dim
    range_tokens, late = attend_range_blocks(spec) * spec.block_size, begins_late(spec, many_tokens=True)
    start, attend, finish = start_rows(spec, tiling), _attend_range(spec, tiling), finish_item(spec, tiling)
    runs_stage, looks_beyond = find_runs(spec), spec.invariant or decodes_in_step(spec)
    merge_stage = _merge_range(rows, dim)
    functions = ScoreFunctions(spec, many_tokens=True)

    @script.prim_func(s_tir=True)
    def fused_attend(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        token_positions_handle: T.handle,
        tree_mask_handle: T.handle,
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
        seq: T.int32,
        token_begin: T.int32,
        num_query: T.int32,
        kv_head_begin: T.int32,
        num_kv_heads: T.int32,
        block_begin: T.int32,
        block_end: T.int32,
        partial_start: T.int32,
        causal: T.int32,
        tree_start: T.int64,
        tree_size: T.int32,
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
        token_positions = arrays.positions(token_positions_handle)
        tree_mask = arrays.tree_mask(tree_mask_handle)
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
        with T.sblock("root"):
            q_tile = T.sblock_alloc_buffer((tiles, rows, depth), tiling.keys.factor_dtype)
            row_max = T.sblock_alloc_buffer((tiles, rows), "float32")
            row_sum = T.sblock_alloc_buffer((tiles, rows), "float32")
            acc = T.sblock_alloc_buffer((tiles, rows, dim), "float32")
            total_max = T.sblock_alloc_buffer((tiles, rows), "float32")
            total_sum = T.sblock_alloc_buffer((tiles, rows), "float32")
            total_acc = T.sblock_alloc_buffer((tiles, rows, dim), "float32")
            positions = T.sblock_alloc_buffer((tiles, rows), "int32")
            limits = T.sblock_alloc_buffer((tiles, rows), "int32")
            if late:
                begins = T.sblock_alloc_buffer((tiles, rows), "int32")
            if spec.wide_range:
                places = T.sblock_alloc_buffer((tiles, rows), "int32")
            reach = T.sblock_alloc_buffer((tiles, 4), "int32")
            span = T.sblock_alloc_buffer((3,), "int32")
            context_len: T.let = context_lens[seq]
            head_tiles: T.let = T.ceildiv(num_query * spec.group, rows)
            num_tiles: T.let = num_kv_heads * head_tiles
            item = T.meta_var(Item(
                seq, token_begin, num_query, kv_head_begin, num_kv_heads, head_tiles, score_scale,
                Bounds(positions, limits, begins if late else None, places if spec.wide_range else None, reach),
                Tree(tree_mask, tree_start, tree_size, context_len - tree_size), alibi_slopes if spec.alibi else None,
                allocate_sums(spec, "query_sums", tiles, rows), allocate_units(tiling, "query_units", tiles),
            ))  # fmt: skip
            sees_all: T.let = T.Or(causal == 0, tree_start >= T.int64(0))
            total = T.meta_var(State(total_max, total_sum, total_acc, 0))
            running = T.meta_var(State(row_max, row_sum, acc, 0))
            start(query, q_tile, item, num_tiles, token_positions, context_len, sees_all, query_scale, total, span)
            runs = T.meta_var(runs_stage(token_begin, num_query, token_positions, context_len, sees_all))
            first_key: T.let = block_begin * spec.block_size
            key_end: T.let = T.min(block_end * spec.block_size, span[1])
            num_ranges: T.let = T.ceildiv(T.max(key_end - first_key, 0), range_tokens)
            for number in range(num_ranges):
                with T.sblock("key_range"):
                    vrange = T.axis.opaque(num_ranges, number)
                    T.reads()
                    T.writes()
                    range_begin: T.let = first_key + vrange * range_tokens
                    range_end: T.let = script.opaque(T.min(range_begin + range_tokens, key_end))
                    unseen: T.let = T.max(span[0] - range_begin, 0)
                    read_begin: T.let = script.opaque(range_begin + unseen - T.floormod(unseen, kv_tile))
                    num_steps: T.let = T.ceildiv(T.max(range_end - read_begin, 0), kv_tile)
                    for step in range(num_steps):
                        with T.sblock("kv_tile"):
                            vstep = T.axis.opaque(num_steps, step)
                            T.reads()
                            T.writes()
                            key_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                            if not spec.shared_kv:
                                value_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                            keys = T.meta_var(Cache(key_cache, k_block, k_row, k_head, key_offsets))
                            values = T.meta_var(
                                keys if spec.shared_kv else Cache(value_cache, v_block, v_row, v_head, value_offsets)
                            )
                            attend(
                                q_tile, keys, values, scales if spec.has_scales else None, table, of_functions, item,
                                running, vstep, num_steps, read_begin + vstep * kv_tile, range_end,
                                key_end if looks_beyond else range_end, runs, context_len, span,
                            )  # fmt: skip
                    merge_stage(running, total, num_tiles, num_steps, read_begin, reach)
            finish(
                total, State(partial_max, partial_sum, partial_acc, partial_start), partial_start < 0, out, lse, item,
                num_tiles, sinks if spec.sinks else None,
            )  # fmt: skip

    return without(fused_attend, *unused(spec))


def _merge_range(rows: int, dim: int) -> Callable[..., None]:
    """The states of a range into those of all ranges before it, of the tiles of rows that see a key of the range."""
    merge_stage = state.merge(rows, dim, "range_")

    @script.inline
    def stage(running, total, num_tiles, num_steps, read_begin, reach):
        for tile in range(num_tiles):
            with T.sblock("range_state"):
                vtile = T.axis.spatial(num_tiles, tile)
                T.reads()
                T.writes()
                if T.And(num_steps > 0, read_begin < reach[vtile, LIMIT]):
                    merge_stage(running._replace(slot=vtile), total._replace(slot=vtile), 1, 2)

    return stage


def _attend_range(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """A tile of tokens through the four stages: kv head by kv head, and in each tile of rows by tile of rows."""
    key_offsets_stage = token_offsets(spec, key_access(spec, tiling))
    value_offsets_stage = token_offsets(spec, value_access(spec, tiling))
    key_copy, value_copy = key_copy_shape(spec, tiling), copy_shape(tiling, tiling.values, spec.result_dim)
    load_keys = load_tile(tiling, key_access(spec, tiling), tiling.keys, key_copy, "load_keys")
    load_values = load_tile(tiling, value_access(spec, tiling), tiling.values, value_copy, "load_values")
    attend, k_dtype, v_dtype = attend_rows(spec, tiling), tiling.keys.factor_dtype, tiling.values.factor_dtype
    columns_stage = compute_columns(ScoreFunctions(spec, many_tokens=True), tiling)
    scales_stage, head_stage = look_up_scales(spec, tiling), scales_of_head(spec, tiling)
    load_all, in_whole = load_whole(spec, tiling), tiling.in_tile_registers and tiling.copy_values
    by_token = spec.kv_layout == "NHD" and not tiling.in_tile_registers
    announce_keys, announce_values, announce_early = map(ahead.announce, (ahead.KEYS, ahead.VALUES, ahead.EARLY_KEYS))

    @script.inline
    def stage(
        q_tile, key_cache, value_cache, scales, table, of_functions, item, running, step, num_steps, start, range_end,
        key_end, runs, context_len, span,
    ):  # fmt: skip
        tile_start: T.let = script.opaque(start)
        valid_len: T.let = script.opaque(T.min(range_end - tile_start, tiling.kv_tile))
        first_token = T.meta_var(span[0] if begins_late(spec, many_tokens=True) else None)
        tile = T.meta_var(Tile(tiling, tile_start, valid_len))
        has_next: T.let = tile_start + tiling.kv_tile < key_end
        at_once = T.meta_var(tiling.few_groups * tiling.token_group)
        num_offsets: T.let = T.Select(has_next, tiling.num_offsets, T.ceildiv(valid_len, at_once) * at_once)
        key_offsets_stage(table, key_cache, tile, item.seq, key_end - 1, num_offsets, first_token, runs)
        if not spec.shared_kv:
            value_offsets_stage(table, value_cache, tile, item.seq, key_end - 1, num_offsets, first_token, runs)
        given = T.meta_var(scales and scales._replace(sums=item.sums, units=item.units))
        scales_of_tile = T.meta_var(scales_stage(given, table, tile, item.seq, key_end - 1, first_token, runs))
        computed = T.meta_var(columns_stage(of_functions, item.seq, context_len, tile, tile.num_groups))
        for kv_head in range(item.num_kv_heads):
            with T.sblock("kv_head"):
                vkv = T.axis.spatial(item.num_kv_heads, kv_head)
                T.reads()
                T.writes()
                # next: these tokens in the next kv head; after the last one, the next tokens in the first
                is_last: T.let = by_token or vkv == item.num_kv_heads - 1
                next_tile: T.let = T.Select(is_last, tiling.kv_tile, 0)
                next_head: T.let = T.Cast("int64", item.kv_head_begin + T.Select(is_last, 0, vkv + 1))
                shares = T.meta_var((item.num_kv_heads, vkv) if by_token else ())
                key_head: T.let = T.Cast("int64", item.kv_head_begin + vkv) * key_cache.head
                value_head: T.let = T.Cast("int64", item.kv_head_begin + vkv) * value_cache.head
                of_head = T.meta_var(head_stage(scales_of_tile, item.kv_head_begin + vkv, tile, item.scale))
                more: T.let = T.Or(has_next, T.Not(is_last))
                if tiling.fetches_early:
                    announce_early(key_cache, next_tile, next_head * key_cache.head, T.And(item.head_tiles == 1, more))
                if tiling.copy_keys:
                    k_tile = T.sblock_alloc_buffer(key_copy, k_dtype)
                    load_keys(key_cache, k_tile, key_head, tile.num_groups)
                if tiling.copy_values:
                    v_tile = T.sblock_alloc_buffer(value_copy, v_dtype)
                    if tiling.in_tile_registers:
                        infinite = T.sblock_alloc_buffer((1,), "int32")
                        load_all(value_cache, v_tile, infinite, value_head, tile, span[2], item.tree)
                    else:
                        load_values(value_cache, v_tile, value_head, tile.num_groups)
                keys = T.meta_var(key_cache._replace(memory=k_tile) if tiling.copy_keys else key_cache)
                values = T.meta_var(value_cache._replace(memory=v_tile) if tiling.copy_values else value_cache)
                for row_tile in range(item.head_tiles):
                    with T.sblock("row_tile"):
                        vrt = T.axis.spatial(item.head_tiles, row_tile)
                        T.reads()
                        T.writes()
                        first: T.let = script.opaque(vkv * item.head_tiles + vrt)
                        if tiling.prefetches:
                            wanted: T.let = T.And(vrt == item.head_tiles - 1, more)
                            of_keys = T.meta_var(T.And(wanted, item.head_tiles > 1) if tiling.fetches_early else wanted)
                            announce_keys(key_cache, next_tile, next_head * key_cache.head, of_keys, *shares)
                            if not spec.shared_kv:
                                announce_values(value_cache, next_tile, next_head * value_cache.head, wanted, *shares)
                        if tile_start < item.bounds.reach[first, LIMIT]:
                            attend(
                                q_tile, first, keys, key_head, values, value_head, tile, running._replace(slot=first),
                                step, num_steps, item, computed, infinite if in_whole else None, of_head,
                            )  # fmt: skip

    return stage
