"""Decode on CUDA: split-KV, a thread block for a range of a sequence and a tile of the query heads of one kv head."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels import fma as cuda_fma
from pa_compiler.cuda.kernels import tensor_core as cuda_tensor_core
from pa_compiler.cuda.kernels.join import join_warps
from pa_compiler.cuda.kernels.plan import find_item
from pa_compiler.cuda.kernels.ring import copy_tile, look_up
from pa_compiler.cuda.kernels.strategy import NEGATIVE_INFINITY
from pa_compiler.cuda.tiling import WARP, CudaTiling
from pa_compiler.kernels.headroom import headroom
from pa_compiler.spec import PagedAttentionSpec

STRATEGIES = {"tensor_cores": cuda_tensor_core.strategy, "fma": cuda_fma.strategy}


def cuda_decode(spec: PagedAttentionSpec, tiling: CudaTiling) -> PrimFunc:
    """Blocks [items * head_tiles] of tiling.threads threads: each a work item and a tile of query heads.

    Caches, query, out and lse are spans of memory with strides in elements, head_dim contiguous. Keys and values start
    at addresses, and have strides, that are multiples of 16 bytes; a query of 4 bytes. items is batch + extra
    (cuda_plan). Shapes, lengths and block ids are trusted unless status[0] is not 0: then nothing is read or written.
    """
    dtype, group = spec.dtype, spec.group
    warps, tokens, stages = tiling.warps, tiling.tile_tokens, tiling.stages
    row_tiles, head_tiles = tiling.row_tiles(spec), tiling.head_tiles(spec)
    tile = tiling.tile_words(spec)
    results = warps * tiling.row_tile

    find_item_stage = find_item(tiling)
    look_up_stage, copy_tile_stage = look_up(spec, tiling), copy_tile(spec, tiling)
    strategy = STRATEGIES[tiling.strategy](spec, tiling)
    join_stage = join_warps(spec, tiling)

    @T.prim_func
    def cuda_decode(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        status_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        q_batch: T.int64,
        q_head: T.int64,
        k_block: T.int64,
        k_row: T.int64,
        k_head: T.int64,
        v_block: T.int64,
        v_row: T.int64,
        v_head: T.int64,
        table_seq: T.int64,
        out_batch: T.int64,
        out_head: T.int64,
        lse_batch: T.int64,
        batch: T.int32,
        items: T.int32,
        query_scale: T.float32,
        score_scale: T.float32,
    ):
        q_span, k_span, v_span, table_span, length_span = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        status_span, max_span, sum_span, acc_span = T.int64(), T.int64(), T.int64(), T.int64()
        out_span, lse_span = T.int64(), T.int64()
        query = T.match_buffer(query_handle, (q_span,), dtype)
        key_cache = T.match_buffer(key_cache_handle, (k_span,), dtype)
        value_cache = T.match_buffer(value_cache_handle, (v_span,), dtype)
        block_table = T.match_buffer(block_table_handle, (table_span,), "int32")
        context_lens = T.match_buffer(context_lens_handle, (length_span,), "int32")
        status = T.match_buffer(status_handle, (status_span,), "int32")
        partial_max = T.match_buffer(partial_max_handle, (max_span,), "float32")
        partial_sum = T.match_buffer(partial_sum_handle, (sum_span,), "float32")
        partial_acc = T.match_buffer(partial_acc_handle, (acc_span,), "float32")
        out = T.match_buffer(out_handle, (out_span,), spec.result_dtype)
        lse = T.match_buffer(lse_handle, (lse_span,), "float32")
        T.device_entry()
        cta = T.cta_id([items * head_tiles])
        warp_id = T.warp_id([warps])
        lane_id = T.lane_id([WARP])
        ring = T.alloc_buffer((tiling.shared_bytes(spec) // 4,), "uint32", scope="shared.dyn", align=128)
        warp_max = T.decl_buffer((results,), "float32", data=ring.data, scope="shared.dyn")
        warp_sum = T.decl_buffer((results,), "float32", data=ring.data, scope="shared.dyn", elem_offset=results)
        warp_acc = T.decl_buffer(
            (results * tiling.acc_pitch(spec),), "float32", data=ring.data, scope="shared.dyn", elem_offset=2 * results
        )
        found = T.alloc_buffer((5,), "int32", scope="local")
        block = T.alloc_buffer((1,), "int32", scope="local")
        q = T.alloc_buffer((strategy.query[0],), strategy.query[1], scope="local")
        row_max = T.alloc_buffer((strategy.row_max,), "float32", scope="local")
        row_sum = T.alloc_buffer((strategy.row_sum,), "float32", scope="local")
        acc = T.alloc_buffer((strategy.acc,), "float32", scope="local")
        warp: T.int32 = warp_id
        lane: T.int32 = lane_id
        item: T.int32 = T.truncdiv(cta, head_tiles)
        kv_head: T.int32 = T.truncdiv(T.truncmod(cta, head_tiles), row_tiles)
        first_row: T.int32 = T.truncmod(cta, row_tiles) * tiling.row_tile
        stopped: T.int32 = status[0]  # on its way while the item is found
        find_item_stage(context_lens, batch, items - batch, item, lane, found)
        if (found[0] >= 0) & (stopped == 0):
            seq: T.int64 = T.Cast("int64", found[0])
            rows: T.int32 = T.min(group - first_row, tiling.row_tile)
            end: T.int32 = found[2]
            places: T.int32 = headroom(spec, found[4])
            own: T.int32 = found[1] + warp * tokens
            num_tiles: T.int32 = T.truncdiv(T.max(end - own, 0) + (tiling.step_tokens - 1), tiling.step_tokens)
            strategy.load_query(
                query, seq * q_batch + T.Cast("int64", kv_head * group + first_row) * q_head, q_head, rows,
                query_scale, lane, q,
            )  # fmt: skip
            for i in T.unroll(strategy.row_max):
                row_max[i] = T.float32(NEGATIVE_INFINITY)
            for i in T.unroll(strategy.row_sum):
                row_sum[i] = T.float32(0)
            for i in T.unroll(strategy.acc):
                acc[i] = T.float32(0)
            if num_tiles > 0:
                look_up_stage(block_table, seq * table_seq, own, end, lane, block)
            for step in range(num_tiles + stages - 1):
                if step < num_tiles:
                    copy_tile_stage(
                        key_cache, value_cache, ring, (warp * stages + T.truncmod(step, stages)) * 2 * tile,
                        k_block, k_row, T.Cast("int64", kv_head) * k_head,
                        v_block, v_row, T.Cast("int64", kv_head) * v_head,
                        block, own + step * tiling.step_tokens, end, lane,
                    )  # fmt: skip
                    look_up_stage(block_table, seq * table_seq, own + (step + 1) * tiling.step_tokens, end, lane, block)
                T.ptx["cp.async.commit_group"]()
                if step >= stages - 1:
                    T.ptx["cp.async.wait_group"](stages - 1)
                    T.cuda.warp_sync()
                    ready: T.int32 = step - (stages - 1)
                    keys: T.int32 = (warp * stages + T.truncmod(ready, stages)) * 2 * tile
                    strategy.attend(
                        ring, keys, keys + tile, score_scale, T.Cast("float32", places),
                        end - own - ready * tiling.step_tokens, lane, q, row_max, row_sum, acc,
                    )  # fmt: skip
                    T.cuda.warp_sync()
            T.ptx["cp.async.wait_group"](0)
            T.cuda.cta_sync()  # the results take the place of the rings
            strategy.store_warp(row_max, row_sum, acc, warp, lane, warp_max, warp_sum, warp_acc)
            T.cuda.cta_sync()
            join_stage(
                warp_max, warp_sum, warp_acc, warp * WARP + lane, found[3] == 1, item, kv_head * group + first_row,
                rows, places, partial_max, partial_sum, partial_acc, out, seq * out_batch, out_head, lse,
                seq * lse_batch,
            )  # fmt: skip

    return cuda_decode
