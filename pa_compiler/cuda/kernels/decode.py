"""Decode on CUDA: split-KV, a thread block for a range of a sequence and a tile of the query heads of one kv head."""

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels import fma, tensor_core
from pa_compiler.cuda.kernels.arrays import Arrays, Cache
from pa_compiler.cuda.kernels.join import join_warps, warp_results
from pa_compiler.cuda.kernels.plan import find_item
from pa_compiler.cuda.kernels.ring import copy_tile, look_up
from pa_compiler.cuda.kernels.scores import Functions, Scoring, Tile, load_slopes
from pa_compiler.cuda.kernels.state import allocate, start
from pa_compiler.cuda.kernels.strategy import Strategy
from pa_compiler.cuda.tiles import WARP, CudaTiling, FmaTiling, TensorCoreTiling
from pa_compiler.kernels.arrays import without
from pa_compiler.kernels.headroom import headroom
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    TensorCoreTiling.strategy: tensor_core.strategy,
    FmaTiling.strategy: fma.strategy,
}
"""By CudaTiling.strategy."""


def cuda_decode(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [items * head_tiles] of tiling.threads threads: each a work item and a tile of query heads.

    items is batch + extra (plan.py). Writes out and lse of a sequence of one range, and partial results of the others.
    Shapes, lengths and block ids are trusted unless status[0] is not 0: then nothing is read or written.
    """
    arrays, strategy = Arrays(spec), STRATEGIES[tiling.strategy](spec, tiling)
    registers, row_tiles, head_tiles = strategy.registers, tiling.row_tiles(spec), tiling.head_tiles(spec)
    find_item_stage, start_stage, load_slopes_stage = find_item(spec, tiling), start(registers), load_slopes(registers)
    functions = Functions(spec)
    attend_range_stage, join_stage = attend_range(spec, tiling, strategy), join_warps(spec, tiling)

    @T.prim_func
    def cuda_decode(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        row_starts_handle: T.handle,
        context_lens_handle: T.handle,
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
        table_seq: T.int64,
        row_step: T.int64,
        out_batch: T.int64,
        out_head: T.int64,
        lse_batch: T.int64,
        slope_head: T.int64,
        sink_head: T.int64,
        batch: T.int32,
        items: T.int32,
        query_scale: T.float32,
        score_scale: T.float32,
    ):
        query = arrays.query(query_handle)
        key_cache = arrays.key_cache(key_cache_handle)
        value_cache = arrays.value_cache(value_cache_handle)
        block_table = arrays.block_table(block_table_handle)
        row_starts = arrays.row_starts(row_starts_handle)
        context_lens = arrays.context_lens(context_lens_handle)
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
        cta = T.cta_id([items * head_tiles])
        warp_id = T.warp_id([tiling.warps])
        lane_id = T.lane_id([WARP])
        ring = T.alloc_buffer((tiling.shared_bytes(spec) // 4,), "uint32", scope="shared.dyn", align=128)
        results = T.meta_var(warp_results(spec, tiling, ring))
        found = T.alloc_buffer((5,), "int32", scope="local")
        q = T.alloc_buffer((strategy.query[0],), strategy.query[1], scope="local")
        state = T.meta_var(allocate(registers))
        if spec.alibi:
            slopes = T.alloc_buffer((registers.rows,), "float32", scope="local")
        warp: T.int32 = warp_id
        lane: T.int32 = lane_id
        item: T.int32 = T.truncdiv(cta, head_tiles)
        kv_head: T.int32 = T.truncdiv(T.truncmod(cta, head_tiles), row_tiles)
        first_row: T.int32 = T.truncmod(cta, row_tiles) * tiling.row_tile
        stopped: T.int32 = status[0]  # on its way while the item is found
        find_item_stage(context_lens, batch, items - batch, item, lane, found)
        if (found[0] >= 0) & (stopped == 0):
            seq: T.int64 = T.Cast("int64", found[0])
            row: T.int64 = seq * table_seq + T.Cast("int64", row_starts[seq * row_step])
            rows: T.int32 = T.min(spec.group - first_row, tiling.row_tile)
            places: T.int32 = headroom(spec, found[4])
            keys = T.meta_var(Cache(key_cache, k_block, k_row, T.Cast("int64", kv_head) * k_head))
            values = T.meta_var(Cache(value_cache, v_block, v_row, T.Cast("int64", kv_head) * v_head))
            strategy.load_query(
                query, seq * q_batch + T.Cast("int64", kv_head * spec.group + first_row) * q_head, q_head, rows,
                query_scale, lane, q,
            )  # fmt: skip
            if spec.alibi:
                load_slopes_stage(alibi_slopes, slope_head, kv_head * spec.group + first_row, rows, lane, slopes)
            start_stage(state)
            scoring = T.meta_var(
                Scoring(
                    found[0],
                    found[4],
                    batch,
                    kv_head * spec.group + first_row,
                    slopes if spec.alibi else None,
                    of_functions,
                )
            )
            attend_range_stage(
                keys, values, block_table, row, ring, found[1], found[2], warp, lane, q,
                score_scale, T.Cast("float32", places), scoring, state,
            )  # fmt: skip
            T.cuda.cta_sync()  # the results take the place of the rings
            strategy.store_warp(state, warp, lane, results)
            T.cuda.cta_sync()
            join_stage(
                results, warp * WARP + lane, found[3] == 1, item, kv_head * spec.group + first_row, rows, places,
                partials, out, seq * out_batch, out_head, lse, seq * lse_batch,
                sinks if spec.sinks else None, sink_head,
            )  # fmt: skip

    unused = [name for name, has in (("slope_head", spec.alibi), ("sink_head", spec.sinks)) if not has]
    return without(cuda_decode, *unused)


def attend_range(spec: PagedAttentionSpec, tiling: CudaTiling, strategy: Strategy) -> Callable[..., None]:
    """A warp's tiles of the tokens [range_start, range_end), each on its way while those before it are computed."""
    tokens, stages, step_tokens = tiling.tile_tokens, tiling.stages, tiling.step_tokens
    stage_words = tiling.stage_words(spec)
    look_up_stage, copy_tile_stage, functions = look_up(spec, tiling), copy_tile(spec, tiling), Functions(spec)

    @inline
    def stage(key_cache, value_cache, block_table, table_offset, ring, range_start, range_end, warp, lane, q,
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
                        key_cache, value_cache, ring, tile, block, own + step * step_tokens, end, lane, scoring
                    )  # fmt: skip
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
