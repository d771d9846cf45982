"""append_kv on CUDA: keys and values of new tokens into their slots of the paged caches, in one launch.

Of two tokens with the same slot the later one stays, as on the CPU. A GPU has no order of its own, so a thread block
first looks whether a later token names a slot of one of its own tokens, and leaves that token out: what is written is
written by one token alone. For n tokens these are n^2 / 2 comparisons of numbers that lie in cache, beside the copy.
"""

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.kernels.check import report_slots
from pa_compiler.cuda.kernels.quantise import quantise_tokens
from pa_compiler.cuda.kernels.slots import WARPS, Moved, find_lost, find_target, load_chunk
from pa_compiler.cuda.tiles import CHUNK_BYTES, CHUNK_WORDS, WARP, chunks
from pa_compiler.cuda.tiling import APPEND_THREADS, APPEND_TOKENS
from pa_compiler.kernels.arrays import without
from pa_compiler.kernels.scales import unused
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tvmscript import inline


def cuda_append_kv(spec: PagedAttentionSpec) -> PrimFunc:
    """Blocks [ceil(num_tokens / APPEND_TOKENS)] of APPEND_THREADS threads: all heads of some tokens.

    A token with a negative slot is skipped. With a status other than 0 nothing is read or written but the report of
    what cuda_check_slots found. Elements are moved as they are: NaNs keep their bits; or they become codes. With
    shared_kv there are keys alone: value and value_cache are not read or written.
    """
    arrays, report_stage = Arrays(spec), report_slots(spec)
    find_lost_stage, move_stage = find_lost(), (quantise_tokens if spec.has_scales else move_tokens)(spec)

    @T.prim_func
    def cuda_append_kv(
        key_handle: T.handle,
        value_handle: T.handle,
        key_cache_handle: T.handle,
        value_cache_handle: T.handle,
        key_scale_handle: T.handle,
        value_scale_handle: T.handle,
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
        ks_block: T.int64,
        ks_row: T.int64,
        ks_head: T.int64,
        vs_block: T.int64,
        vs_row: T.int64,
        vs_head: T.int64,
        num_blocks: T.int64,
        num_tokens: T.int32,
    ):
        key = arrays.bits("key", key_handle)
        value = arrays.bits("value", value_handle)
        key_cache = arrays.bits("key_cache", key_cache_handle)
        value_cache = arrays.bits("value_cache", value_cache_handle)
        key_scale, value_scale = T.meta_var(arrays.scales(key_scale_handle, value_scale_handle) or (None, None))
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
        key_scales = T.meta_var((key_scale, ks_block, ks_row, ks_head))
        keys = T.meta_var(Moved(key, key_token, key_head, key_cache, k_block, k_row, k_head, *key_scales))
        value_scales = T.meta_var((value_scale, vs_block, vs_row, vs_head))
        values = T.meta_var(Moved(value, value_token, value_head, value_cache, v_block, v_row, v_head, *value_scales))
        if (status[0] != 0) & (cta == 0) & (thread == 0):
            report_stage(status, slot_mapping, num_blocks, report)
        if status[0] == 0:
            find_lost_stage(slot_mapping, first, num_tokens, warp, lane_id, thread, again)
            T.cuda.cta_sync()
            move_stage(keys, values, slot_mapping, first, num_tokens, thread, again)

    return without(cuda_append_kv, *unused(spec))


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
            find_target(slot_mapping, first, local, num_tokens, again, target)
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
def store_chunk(words, at, moved, block, slot, head, d):
    """The 16 bytes from element d on of a slot's head = words[at : at + 4]."""
    T.ptx["st.global.v4.b32"](
        moved.cache.ptr_to([block * moved.block + slot * moved.row + head * moved.cache_head + d]),
        words[at], words[at + 1], words[at + 2], words[at + 3],
    )  # fmt: skip
