"""append_kv on CUDA: keys and values of new tokens into their slots of the paged caches, in one launch.

Of two tokens with the same slot the later one stays, as on the CPU. A GPU has no order of its own, so a thread block
first looks whether a later token names a slot of one of its own tokens, and leaves that token out: what is written is
written by one token alone. For n tokens these are n^2 / 2 comparisons of numbers that lie in cache, beside the copy.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels.check import report_slots
from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.tiling import APPEND_THREADS, APPEND_TOKENS, CHUNK_BYTES, WARP
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec


def cuda_append_kv(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [ceil(num_tokens / APPEND_TOKENS)] of APPEND_THREADS threads: all heads of some tokens.

    key, value: spans with strides of tokens and heads. key_cache, value_cache: as in cuda_decode. All start at
    addresses, and have strides, that are multiples of 16 bytes. slot_mapping: int64 [num_tokens], block * block_size +
    slot; a token with a negative one is skipped. With a status other than 0 nothing is read or written but the report
    of what cuda_check_slots found (cuda_check). Elements are moved as they are: NaNs keep their bits.
    """
    heads, block_size, width = spec.num_kv_heads, T.int64(spec.block_size), CHUNK_BYTES // ITEMSIZES[spec.dtype]
    chunks, warps = spec.head_dim // width, APPEND_THREADS // WARP
    bits = f"uint{8 * ITEMSIZES[spec.dtype]}"
    report_stage = report_slots(spec)
    load, store = "ld.global.nc.v4.b32", "st.global.v4.b32"

    @T.prim_func
    def cuda_append_kv(
        key_handle: T.handle,
        value_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        slot_mapping_handle: T.handle,
        status_handle: T.handle,
        report_handle: T.handle,
        key_token: T.int64,
        key_head: T.int64,
        value_token: T.int64,
        value_head: T.int64,
        k_block: T.int64,
        k_row: T.int64,
        k_head: T.int64,
        v_block: T.int64,
        v_row: T.int64,
        v_head: T.int64,
        num_blocks: T.int64,
        num_tokens: T.int32,
    ):
        key_span, value_span, k_span, v_span = T.int64(), T.int64(), T.int64(), T.int64()
        slot_span, status_span, report_span = T.int64(), T.int64(), T.int64()
        key = T.match_buffer(key_handle, (key_span,), bits)
        value = T.match_buffer(value_handle, (value_span,), bits)
        key_cache = T.match_buffer(key_cache_handle, (k_span,), bits)
        value_cache = T.match_buffer(value_cache_handle, (v_span,), bits)
        slot_mapping = T.match_buffer(slot_mapping_handle, (slot_span,), "int64")
        status = T.match_buffer(status_handle, (status_span,), "int32")
        report = T.match_buffer(report_handle, (report_span,), "int64")
        T.device_entry()
        cta = T.cta_id([T.truncdiv(num_tokens + (APPEND_TOKENS - 1), APPEND_TOKENS)])
        warp_id = T.warp_id([warps])
        lane_id = T.lane_id([WARP])
        again = T.alloc_buffer((warps * APPEND_TOKENS,), "int32", scope="shared.dyn", align=16)
        mine = T.alloc_buffer((APPEND_TOKENS,), "int64", scope="local")
        lost = T.alloc_buffer((APPEND_TOKENS,), "int32", scope="local")
        words = T.alloc_buffer((8,), "uint32", scope="local")
        warp: T.int32 = warp_id
        thread: T.int32 = warp_id * WARP + lane_id
        first: T.int32 = cta * APPEND_TOKENS
        if (status[0] != 0) & (cta == 0) & (thread == 0):
            report_stage(status, slot_mapping, num_blocks, report)
        if status[0] == 0:
            for t in T.unroll(APPEND_TOKENS):
                lost[t] = 0
                mine[t] = T.int64(-1)
                if first + t < num_tokens:
                    mine[t] = slot_mapping[first + t]
            for step in range(T.truncdiv(num_tokens - first + (APPEND_THREADS - 1), APPEND_THREADS)):
                later: T.int32 = first + step * APPEND_THREADS + thread
                if later < num_tokens:
                    taken: T.int64 = slot_mapping[later]
                    for t in T.unroll(APPEND_TOKENS):
                        if (first + t < later) & (mine[t] == taken):
                            lost[t] = 1
            for t in T.unroll(APPEND_TOKENS):
                any_lane: T.int32 = T.cuda.any_sync(T.uint32(ALL_LANES), lost[t])
                if lane_id == 0:
                    again[warp * APPEND_TOKENS + t] = any_lane
            T.cuda.cta_sync()
            for step in range(-(-APPEND_TOKENS * heads * chunks // APPEND_THREADS)):
                chunk: T.int32 = step * APPEND_THREADS + thread
                local: T.int32 = T.truncdiv(chunk, heads * chunks)
                target: T.int64 = T.int64(-1)
                if (local < APPEND_TOKENS) & (first + local < num_tokens):
                    target = slot_mapping[first + local]
                    for w in T.unroll(warps):
                        target = T.Select(again[w * APPEND_TOKENS + local] != 0, T.int64(-1), target)
                if target >= T.int64(0):
                    block: T.int64 = T.truncdiv(target, block_size)
                    slot: T.int64 = T.truncmod(target, block_size)
                    head: T.int64 = T.Cast("int64", T.truncmod(T.truncdiv(chunk, chunks), heads))
                    d: T.int64 = T.Cast("int64", T.truncmod(chunk, chunks) * width)
                    token: T.int64 = T.Cast("int64", first + local)
                    T.ptx[load](
                        words[0], words[1], words[2], words[3],
                        key.ptr_to([token * key_token + head * key_head + d]),
                    )  # fmt: skip
                    T.ptx[load](
                        words[4], words[5], words[6], words[7],
                        value.ptr_to([token * value_token + head * value_head + d]),
                    )  # fmt: skip
                    T.ptx[store](
                        key_cache.ptr_to([block * k_block + slot * k_row + head * k_head + d]),
                        words[0], words[1], words[2], words[3],
                    )  # fmt: skip
                    T.ptx[store](
                        value_cache.ptr_to([block * v_block + slot * v_row + head * v_head + d]),
                        words[4], words[5], words[6], words[7],
                    )  # fmt: skip

    return cuda_append_kv
