"""append_kv on CUDA into caches of codes, with the CPU's arithmetic (pa_compiler/kernels): the same codes and scales.

Some lanes of a warp take a row, a head's key or value of one token, each 16 bytes of it at a time. Of int8 they find
the largest magnitude of the row together, of which one of them writes the scale; of float8 they read it.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.elements import numbers_of_words
from pa_compiler.cuda.kernels.slots import find_target, load_chunk
from pa_compiler.cuda.kernels.state import exchange
from pa_compiler.cuda.tiles import CHUNK_BYTES, CHUNK_WORDS, WARP, Element
from pa_compiler.cuda.tiling import APPEND_THREADS, APPEND_TOKENS
from pa_compiler.kernels.elements import INFINITE, MAGNITUDE
from pa_compiler.kernels.quantise import float8_code
from pa_compiler.kernels.quantise_rows import int8_code, int8_scale
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tvmscript import inline

_STORE = {1: "st.global.b32", 2: "st.global.v2.b32"}


def quantise_tokens(spec: PagedAttentionSpec) -> Callable[..., None]:
    """The codes of a thread block's tokens, those that are not lost, to their slots; as append.move_tokens."""
    key_stage, value_stage = quantise_rows(spec, spec.head_dim), quantise_rows(spec, spec.result_dim)

    @inline
    def stage(keys, values, slot_mapping, first, num_tokens, thread, again):
        key_stage(keys, slot_mapping, first, num_tokens, thread, again)
        value_stage(values, slot_mapping, first, num_tokens, thread, again)

    return stage


def quantise_rows(spec: PagedAttentionSpec, dim: int) -> Callable[..., None]:
    """The same of keys, or of values, of `dim` elements, which are `moved`."""
    heads, block_size = spec.num_kv_heads, T.int64(spec.block_size)
    width = CHUNK_BYTES // ITEMSIZES[spec.dtype]  # elements of 16 bytes
    lanes = min(1 << (dim // width - 1).bit_length(), WARP)
    steps, teams = -(-dim // (width * lanes)), APPEND_THREADS // lanes
    load_stage, measure_stage = load_row(spec, dim, lanes), measure(steps * width, lanes)
    store_stage = store_row(spec, dim, lanes)

    @inline
    def stage(moved, slot_mapping, first, num_tokens, thread, again):
        numbers = T.alloc_buffer((steps * width,), "float32", scope="local")
        lane: T.int32 = T.truncmod(thread, lanes)
        for step in range(-(-APPEND_TOKENS * heads // teams)):
            row: T.int32 = step * teams + T.truncdiv(thread, lanes)
            local: T.int32 = T.truncdiv(row, heads)
            head: T.int64 = T.Cast("int64", T.truncmod(row, heads))
            target: T.int64 = T.int64(-1)
            find_target(slot_mapping, first, local, num_tokens, again, target)
            block: T.int64 = T.truncdiv(target, block_size)
            slot: T.int64 = T.truncmod(target, block_size)
            scale_at: T.int64 = block * moved.scale_block + slot * moved.scale_row + head * moved.scale_head
            scale: T.float32 = T.float32(1)
            load_stage(moved, T.Cast("int64", first + local), head, target >= T.int64(0), lane, numbers)
            if spec.token_scales:  # by all lanes, since they exchange what they have
                measure_stage(numbers, scale)
            if target >= T.int64(0):
                if spec.token_scales:
                    if lane == 0:
                        moved.scale[scale_at] = scale
                else:
                    scale = moved.scale[scale_at]
                store_stage(moved, block, slot, head, lane, numbers, scale)

    return stage


def load_row(spec: PagedAttentionSpec, dim: int, lanes: int) -> Callable[..., None]:
    """numbers = a lane's elements of a token's head, float32; 0 beyond its end, and where there is no token."""
    width = CHUNK_BYTES // ITEMSIZES[spec.dtype]
    unpack = numbers_of_words(Element(spec.dtype, by_instruction=False), CHUNK_WORDS)

    @inline
    def stage(moved, token, head, is_there, lane, numbers):
        words = T.alloc_buffer((CHUNK_WORDS,), "uint32", scope="local")
        part = T.alloc_buffer((width,), "float32", scope="local")
        for s in T.unroll(-(-dim // (width * lanes))):
            d = T.meta_var((s * lanes + lane) * width)
            for w in T.unroll(CHUNK_WORDS):
                words[w] = T.uint32(0)
            if is_there & (d < dim):
                load_chunk(words, 0, moved, token, head, T.Cast("int64", d))
            unpack(words, part)
            for i in T.unroll(width):
                numbers[s * width + i] = part[i]

    return stage


def measure(count: int, lanes: int) -> Callable[..., None]:
    """scale, a variable, = max |number| / 127 of a row, of which its lanes have `count` each; NaN is the largest."""

    @inline
    def stage(numbers, scale):
        peak: T.int32 = T.int32(0)
        for i in T.unroll(count):
            peak = T.max(peak, T.bitwise_and(T.reinterpret("int32", numbers[i]), T.int32(MAGNITUDE)))
        for level in T.unroll(lanes.bit_length() - 1):
            peak = T.max(peak, exchange(peak, 1 << level))
        scale = int8_scale(peak)

    return stage


def store_row(spec: PagedAttentionSpec, dim: int, lanes: int) -> Callable[..., None]:
    """The codes of a lane's numbers to the slot, 4 or 8 at a time."""
    width = CHUNK_BYTES // ITEMSIZES[spec.dtype]
    code = code_of(spec)

    @inline
    def stage(moved, block, slot, head, lane, numbers, scale):
        words = T.alloc_buffer((width // 4,), "uint32", scope="local")
        at: T.int64 = block * moved.block + slot * moved.row + head * moved.cache_head
        for s in T.unroll(-(-dim // (width * lanes))):
            d = T.meta_var((s * lanes + lane) * width)
            if d < dim:
                for w in T.unroll(width // 4):
                    words[w] = T.uint32(0)
                    for i in T.unroll(4):
                        found: T.uint32 = code(numbers[s * width + w * 4 + i], scale)
                        words[w] = T.bitwise_or(words[w], T.shift_left(found, T.Cast("uint32", 8 * i)))
                store_words(words, moved.cache.ptr_to([at + T.Cast("int64", d)]))

    def store_words(words: Buffer, pointer: Expr) -> Expr:
        return T.ptx[_STORE[width // 4]](pointer, *(words[w] for w in range(width // 4)))

    return stage


def code_of(spec: PagedAttentionSpec) -> Callable[[Expr, Expr], Expr]:
    """(number, scale) -> its code in the lower byte of a uint32."""
    if spec.token_scales:
        return lambda x, scale: T.Cast("uint32", T.bitwise_and(int8_code(x, scale), 0xFF))
    code = float8_code(spec.cache_dtype)

    def of_quotient(x: Expr, scale: Expr) -> Expr:
        is_nan = T.bitwise_and(T.reinterpret("int32", x), T.int32(MAGNITUDE)) > T.int32(INFINITE)
        return T.Cast("uint32", code(T.Select(is_nan, x, x / scale)))  # division has one NaN, which has no sign

    return of_quotient
