"""decode and attend on CUDA: split-KV, a thread block for a range of a sequence and a tile of rows of one kv head.

The rows of decode are query heads of the sequence's query token, those of attend pairs of a query token and a head.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler.cuda.kernels import fma, plan, tensor_core
from pa_compiler.cuda.kernels.arrays import Arrays, Cache
from pa_compiler.cuda.kernels.join import join_warps, warp_results
from pa_compiler.cuda.kernels.plan import BEGIN, END, LENGTH, RANGE, RANGES, SEQ, TILE, Sequences, find_item, find_tree
from pa_compiler.cuda.kernels.ring import copy_tile, look_up
from pa_compiler.cuda.kernels.scales import scales_of, score_factor, weights_headroom
from pa_compiler.cuda.kernels.scores import Functions, Scoring, Tile, load_slopes
from pa_compiler.cuda.kernels.sight import AFTER, allocate_sight, find_sight
from pa_compiler.cuda.kernels.state import allocate, start
from pa_compiler.cuda.kernels.strategy import Strategy
from pa_compiler.cuda.tiles import WARP, CudaTiling, FmaTiling, TensorCoreTiling
from pa_compiler.kernels.arrays import without
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.rows import BEYOND, AnyRows, Rows, TokenRows
from pa_compiler.kernels.scales import STRIDES
from pa_compiler.kernels.sight import Tree
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    TensorCoreTiling.strategy: tensor_core.strategy,
    FmaTiling.strategy: fma.strategy,
}
"""By CudaTiling.strategy."""


def cuda_decode(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [workers * head_tiles] of tiling.threads threads: each a worker, and a tile of query heads.

    A worker takes the work items (plan.py) that are `workers` apart, from its own number on. Writes out and lse of a
    sequence of one range, and partial results of the others. Shapes, lengths and block ids are trusted unless status[0]
    is not 0: then nothing is read or written.
    """
    return attention(spec, tiling, many_tokens=False).with_attr("global_symbol", "cuda_decode")


def cuda_attend(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [workers * num_kv_heads]: as cuda_decode, for any number of query tokens of each sequence.

    A work item is a range of a sequence and a tile of its rows in a kv head, pairs of a query token and a head. A query
    token sees what comes before it and itself; with sees_all the whole sequence, and with has_tree of its sequence's
    query tokens those that tree_mask says.
    """
    return attention(spec, tiling, many_tokens=True).with_attr("global_symbol", "cuda_attend")


def attention(spec: PagedAttentionSpec, tiling: CudaTiling, many_tokens: bool) -> PrimFunc:
    """cuda_decode, or cuda_attend."""
    arrays, functions = Arrays(spec), Functions(spec, many_tokens)
    strategy = STRATEGIES[tiling.strategy](spec, tiling, functions)
    row_tiles = 1 if many_tokens else tiling.row_tiles(spec)  # of a kv head, in the thread blocks of one worker
    head_tiles = spec.num_kv_heads * row_tiles
    registers, rows_of = strategy.registers, rows_of_item(spec, tiling, many_tokens)
    find_item_stage, find_tree_stage, find_sight_stage = find_item(tiling), find_tree(), find_sight(spec, registers)
    start_stage, load_slopes_stage = start(registers), load_slopes(registers)
    attend_range_stage, join_stage = attend_range(spec, tiling, strategy, functions), join_warps(spec, tiling)

    @T.prim_func
    def cuda_attention(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        key_scale_handle: T.handle,
        value_scale_handle: T.handle,
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
        query_start_loc_handle: T.handle,
        tree_mask_handle: T.handle,
        status_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        alibi_slopes_handle: T.handle,
        sinks_handle: T.handle,
        q_batch: T.int64,
        q_head: T.int64,
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
        table_seq: T.int64,
        row_step: T.int64,
        out_batch: T.int64,
        out_head: T.int64,
        lse_batch: T.int64,
        slope_head: T.int64,
        sink_head: T.int64,
        batch: T.int32,
        num_tokens: T.int32,
        workers: T.int32,
        sees_all: T.int32,
        has_tree: T.int32,
        query_scale: T.float32,
        score_scale: T.float32,
    ):
        query = arrays.query(query_handle)
        key_cache = arrays.key_cache(key_cache_handle)
        value_cache = arrays.value_cache(value_cache_handle)
        scale_arrays = T.meta_var(arrays.scales(key_scale_handle, value_scale_handle))
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        context_lens = arrays.context_lens(context_lens_handle)
        if many_tokens:
            query_start_loc = arrays.query_start_loc(query_start_loc_handle)
            tree_mask = arrays.tree_mask(tree_mask_handle)
        status = arrays.status(status_handle)
        partials = T.meta_var(arrays.partials(partial_max_handle, partial_sum_handle, partial_acc_handle))
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        if spec.alibi:
            alibi_slopes = arrays.alibi_slopes(alibi_slopes_handle)
        if spec.sinks:
            sinks = arrays.sinks(sinks_handle)
        of_functions = T.meta_var(arrays.of_functions(functions.arrays, batch))
        T.device_entry()
        cta = T.cta_id([workers * head_tiles])
        warp_id = T.warp_id([tiling.warps])
        lane_id = T.lane_id([WARP])
        ring = T.alloc_buffer((tiling.shared_bytes(spec) // 4,), "uint32", scope="shared.dyn", align=128)
        results = T.meta_var(warp_results(spec, tiling, ring))
        found = T.alloc_buffer((plan.TILE + 1,), "int32", scope="local")
        q = T.alloc_buffer((strategy.query[0],), strategy.query[1], scope="local")
        state = T.meta_var(allocate(registers))
        if spec.alibi:
            slopes = T.alloc_buffer((registers.rows,), "float32", scope="local")
        if many_tokens:
            tree_start = T.alloc_buffer((1,), "int32", scope="local")
        warp: T.int32 = warp_id
        lane: T.int32 = lane_id
        item: T.int32 = T.truncdiv(cta, head_tiles)
        stopped: T.int32 = status[0]  # on its way while the item is found
        sequences = T.meta_var(Sequences(spec, batch, context_lens, query_start_loc if many_tokens else None))
        find_item_stage(sequences, item, lane, found)
        while (found[SEQ] >= 0) & (stopped == 0):
            seq: T.int64 = T.Cast("int64", found[SEQ])
            row: T.int64 = seq * table_seq + T.Cast("int64", row_starts[seq * row_step])
            kv_head: T.int32 = T.truncdiv(T.truncmod(cta, head_tiles), row_tiles)
            first_row: T.int32 = T.truncmod(cta, row_tiles) * tiling.row_tile
            rows = T.meta_var(rows_of(sequences, found, kv_head, first_row))
            places: T.int32 = headroom(spec, found[LENGTH])
            keys = T.meta_var(Cache(key_cache, k_block, k_row, T.Cast("int64", kv_head) * k_head))
            values = T.meta_var(Cache(value_cache, v_block, v_row, T.Cast("int64", kv_head) * v_head))
            scale_strides = T.meta_var(((ks_block, ks_row, ks_head), (vs_block, vs_row, vs_head)))
            scales = T.meta_var(scales_of(scale_arrays, scale_strides, kv_head))
            if spec.has_scales:
                factor: T.float32 = score_factor(spec, tiling, scales, query_scale, score_scale)
            strategy.load_query(query, q_batch, q_head, rows, query_scale, lane, q)
            if spec.alibi:
                load_slopes_stage(alibi_slopes, slope_head, rows, lane, slopes)
            if many_tokens:
                first_pos: T.int32 = sequences.first_pos(found[SEQ])
                if has_tree != 0:
                    find_tree_stage(sequences, found[SEQ], lane, tree_start)
                tree = T.meta_var(
                    Tree(
                        tree_mask,
                        T.Cast("int64", tree_start[0]),
                        sequences.num_tokens(found[SEQ]),
                        T.Select(has_tree != 0, first_pos, T.int32(BEYOND)),
                    )
                )
                sight = T.meta_var(allocate_sight(spec, registers, tree))
                find_sight_stage(sight, rows, lane, first_pos, found[LENGTH], sees_all != 0, found[END])
                found[END] = T.min(found[END], sight.reach[AFTER])
            start_stage(state)
            of_rows = T.meta_var((rows, slopes if spec.alibi else None, of_functions, sight if many_tokens else None))
            scoring = T.meta_var(Scoring(found[SEQ], found[LENGTH], batch, *of_rows))
            attend_range_stage(
                keys, values, scales, block_table, row, ring, found[BEGIN], found[END], warp, lane, q,
                factor if spec.has_scales else score_scale, weights_headroom(spec, tiling, places), scoring, state,
            )  # fmt: skip
            T.cuda.cta_sync()  # the results take the place of the rings
            strategy.store_warp(state, warp, lane, results)
            T.cuda.cta_sync()
            slots = T.meta_var(T.Cast("int64", num_tokens if many_tokens else batch))  # of a range
            join_stage(
                results, warp * WARP + lane, found[RANGES] == 1, T.Cast("int64", found[RANGE]) * slots, rows, places,
                scales, partials, out, out_batch, out_head, lse, lse_batch, sinks if spec.sinks else None, sink_head,
            )  # fmt: skip
            item = item + workers
            find_item_stage(sequences, item, lane, found)
            T.cuda.cta_sync()  # the next item's keys and values take the place of the results

    has = {"slope_head": spec.alibi, "sink_head": spec.sinks}
    has |= dict.fromkeys(STRIDES, spec.has_scales)
    has |= dict.fromkeys(("num_tokens", "sees_all", "has_tree"), many_tokens)
    return without(cuda_attention, *(name for name, is_there in has.items() if not is_there))


def rows_of_item(spec: PagedAttentionSpec, tiling: CudaTiling, many_tokens: bool) -> Callable[..., AnyRows]:
    """(sequences, found, kv head, first row of decode's tile) -> the rows of a work item."""

    def rows_of(sequences: Sequences, found: Buffer, kv_head: Expr, first_row: Expr) -> AnyRows:
        first_head = kv_head * spec.group
        if not many_tokens:
            return Rows(found[SEQ], first_head + first_row, T.min(spec.group - first_row, tiling.row_tile))
        first_pair, num_tokens = found[TILE] * tiling.row_tile, sequences.num_tokens(found[SEQ])
        num = T.min(num_tokens * spec.group - first_pair, tiling.row_tile)
        return TokenRows(sequences.start(found[SEQ]), num_tokens, first_head, spec.group, first_pair, num)

    return rows_of


def attend_range(
    spec: PagedAttentionSpec, tiling: CudaTiling, strategy: Strategy, functions: Functions
) -> Callable[..., None]:
    """A warp's tiles of the tokens [range_start, range_end), each on its way while those before it are computed."""
    tokens, stages, step_tokens = tiling.tile_tokens, tiling.stages, tiling.step_tokens
    stage_words = tiling.stage_words(spec)
    look_up_stage, copy_tile_stage = look_up(spec, tiling), copy_tile(spec, tiling, functions)

    @inline
    def stage(key_cache, value_cache, scales, block_table, table_offset, ring, range_start, range_end, warp, lane, q,
              score_scale, headroom, scoring, state):  # fmt: skip
        block = T.alloc_buffer((1,), "int32", scope="local")
        end: T.int32 = range_end
        own: T.int32 = range_start + warp * tokens
        num_tiles: T.int32 = T.truncdiv(T.max(end - own, 0) + (step_tokens - 1), step_tokens)
        if num_tiles > 0:
            look_up_stage(block_table, table_offset, own, end, lane, block)
        for step in range(num_tiles + stages - 1):
            if step < num_tiles:
                tile = T.meta_var((warp * stages + T.truncmod(step, stages)) * stage_words)
                if functions.tile_is_seen(scoring, own + step * step_tokens, tokens):
                    copy_tile_stage(
                        key_cache, value_cache, scales, ring, tile, block, own + step * step_tokens, end, lane, scoring
                    )
                look_up_stage(block_table, table_offset, own + (step + 1) * step_tokens, end, lane, block)
            T.ptx["cp.async.commit_group"]()
            if step >= stages - 1:
                T.ptx["cp.async.wait_group"](stages - 1)
                T.cuda.warp_sync()
                ready: T.int32 = step - (stages - 1)
                keys: T.int32 = (warp * stages + T.truncmod(ready, stages)) * stage_words
                tile = T.meta_var(Tile(own + ready * step_tokens, end - own - ready * step_tokens))
                if functions.tile_is_seen(scoring, own + ready * step_tokens, tokens):
                    strategy.attend(ring, keys, score_scale, headroom, tile, scoring, lane, q, state)
                T.cuda.warp_sync()
        T.ptx["cp.async.wait_group"](0)

    return stage
