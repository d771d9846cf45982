"""append_kv on CUDA: keys and values of new tokens into their slots of the paged caches, in one launch.

Of two tokens with the same slot the later one stays, as on the CPU. A GPU has no order of its own, so a thread block
first looks whether a later token names a slot of one of its own tokens, and leaves that token out: what is written is
written by one token alone. For n tokens these are n^2 / 2 comparisons of numbers that lie in cache, beside the copy.
"""

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.kernels.check import report_slots
from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.tiles import CHUNK_BYTES, CHUNK_WORDS, WARP, chunks
from pa_compiler.cuda.tiling import APPEND_THREADS, APPEND_TOKENS
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tvmscript import inline

WARPS = APPEND_THREADS // WARP


class Moved(NamedTuple):
    """Rows of new keys, or values, and where they go; strides in elements, int64.

    Attributes:
        new: key or value.
        token, head: Its strides.
        cache: key_cache or value_cache.
        block, row, cache_head: Its strides.
    """

    new: Buffer
    token: Expr
    head: Expr
    cache: Buffer
    block: Expr
    row: Expr
    cache_head: Expr


def cuda_append_kv(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [ceil(num_tokens / APPEND_TOKENS)] of APPEND_THREADS threads: all heads of some tokens.

    A token with a negative slot is skipped. With a status other than 0 nothing is read or written but the report of
    what cuda_check_slots found. Elements are moved as they are: NaNs keep their bits. With shared_kv there are keys
    alone: value and value_cache are not read or written.
    """
    arrays, report_stage = Arrays(spec), report_slots(spec)
    find_lost_stage, move_stage = find_lost(), move_tokens(spec)

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
        key = arrays.bits("key", key_handle)
        value = arrays.bits("value", value_handle)
        key_cache = arrays.bits("key_cache", key_cache_handle)
        value_cache = arrays.bits("value_cache", value_cache_handle)
        slot_mapping = arrays.slot_mapping(slot_mapping_handle)
        status = arrays.status(status_handle)
        report = arrays.report(report_handle)
        T.device_entry()
        cta = T.cta_id([T.truncdiv(num_tokens + (APPEND_TOKENS - 1), APPEND_TOKENS)])
        warp_id = T.warp_id([WARPS])
        lane_id = T.lane_id([WARP])
        again = T.alloc_buffer((WARPS * APPEND_TOKENS,), "int32", scope="shared.dyn", align=16)
        warp: T.int32 = warp_id
        thread: T.int32 = warp_id * WARP + lane_id
        first: T.int32 = cta * APPEND_TOKENS
        keys = T.meta_var(Moved(key, key_token, key_head, key_cache, k_block, k_row, k_head))
        values = T.meta_var(Moved(value, value_token, value_head, value_cache, v_block, v_row, v_head))
        if (status[0] != 0) & (cta == 0) & (thread == 0):
            report_stage(status, slot_mapping, num_blocks, report)
        if status[0] == 0:
            find_lost_stage(slot_mapping, first, num_tokens, warp, lane_id, thread, again)
            T.cuda.cta_sync()
            move_stage(keys, values, slot_mapping, first, num_tokens, thread, again)

    return cuda_append_kv


def find_lost() -> Callable[..., None]:
    """again[warp, t] = whether the warp has seen a later token with the slot of token first + t."""

    @inline
    def stage(slot_mapping, first, num_tokens, warp, lane, thread, again):
        mine = T.alloc_buffer((APPEND_TOKENS,), "int64", scope="local")
        lost = T.alloc_buffer((APPEND_TOKENS,), "int32", scope="local")
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
            if lane == 0:
                again[warp * APPEND_TOKENS + t] = any_lane

    return stage


def move_tokens(spec: PagedAttentionSpec) -> Callable[..., None]:
    """Copy the keys and values of a thread block's tokens, those that are not lost, to their slots.

    A thread takes the same 16 bytes of a head's key and of its value, where both are so long: two loads, then two
    stores.
    """
    heads, block_size, width = spec.num_kv_heads, T.int64(spec.block_size), CHUNK_BYTES // ITEMSIZES[spec.dtype]
    key_chunks, value_chunks = chunks(spec, spec.head_dim), 0 if spec.shared_kv else chunks(spec, spec.result_dim)
    most = max(key_chunks, value_chunks)

    def reaches(count, c):
        """Whether chunk c is one of `count`; known when the kernel is made where they are all or none."""
        return count == most if count in (0, most) else c < count

    @inline
    def stage(keys, values, slot_mapping, first, num_tokens, thread, again):
        words = T.alloc_buffer((2 * CHUNK_WORDS,), "uint32", scope="local")
        for step in range(-(-APPEND_TOKENS * heads * most // APPEND_THREADS)):
            chunk: T.int32 = step * APPEND_THREADS + thread
            local: T.int32 = T.truncdiv(chunk, heads * most)
            target: T.int64 = T.int64(-1)
            if (local < APPEND_TOKENS) & (first + local < num_tokens):
                target = slot_mapping[first + local]
                for w in T.unroll(WARPS):
                    target = T.Select(again[w * APPEND_TOKENS + local] != 0, T.int64(-1), target)
            if target >= T.int64(0):
                block: T.int64 = T.truncdiv(target, block_size)
                slot: T.int64 = T.truncmod(target, block_size)
                head: T.int64 = T.Cast("int64", T.truncmod(T.truncdiv(chunk, most), heads))
                d: T.int64 = T.Cast("int64", T.truncmod(chunk, most) * width)
                token: T.int64 = T.Cast("int64", first + local)
                if reaches(key_chunks, T.truncmod(chunk, most)):
                    load_chunk(words, 0, keys, token, head, d)
                if reaches(value_chunks, T.truncmod(chunk, most)):
                    load_chunk(words, CHUNK_WORDS, values, token, head, d)
                if reaches(key_chunks, T.truncmod(chunk, most)):
                    store_chunk(words, 0, keys, block, slot, head, d)
                if reaches(value_chunks, T.truncmod(chunk, most)):
                    store_chunk(words, CHUNK_WORDS, values, block, slot, head, d)

    return stage


@inline
def load_chunk(words, at, moved, token, head, d):
    """words[at : at + 4] = the 16 bytes from element d on of a token's head."""
    T.ptx["ld.global.nc.v4.b32"](
        words[at], words[at + 1], words[at + 2], words[at + 3],
        moved.new.ptr_to([token * moved.token + head * moved.head + d]),
    )  # fmt: skip


@inline
def store_chunk(words, at, moved, block, slot, head, d):
    """The 16 bytes from element d on of a slot's head = words[at : at + 4]."""
    T.ptx["st.global.v4.b32"](
        moved.cache.ptr_to([block * moved.block + slot * moved.row + head * moved.cache_head + d]),
        words[at], words[at + 1], words[at + 2], words[at + 3],
    )  # fmt: skip
