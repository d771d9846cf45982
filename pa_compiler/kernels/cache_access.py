"""Where tokens lie in the paged caches: the one place that turns positions into blocks, slots and memory.

A kernel sees a cache as one span of memory with three strides: of its blocks, of its heads, and of the rows in a block
of one head. In NHD and HND a row is a token, and the two differ in nothing else. Packed, a row of the keys is an
element of head_dim (bfloat16: a pair of them), a row of the values is a token (bfloat16: a pair of tokens). Where the
tiling says so, bfloat16 is read in 32-bit words of two elements. One shift or one mask makes either of them float32; or
the matmuls multiply pairs as they are, of elements of a key, and of one element of the values of two tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.kernels.pairs import half, pair_halves
from pa_compiler.spec import PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


class CacheAccess(NamedTuple):
    """How one of the two caches is read: functions for the bodies of the stages. Offsets are in words, int64.

    Attributes:
        slot_offset: (slot, row_stride) -> from the start of a block to the slot's token, or, of packed keys, to the
            PACKED_TOKENS tokens that it is one of. What a table of offsets holds.
        element: (cache, offsets, t, head_offset, row_stride, d) -> element d of token t as float32.
        pair: (cache, offsets, i, head_offset, row_stride, j) -> a word of two elements, where tiling.dot_pairs: of keys
            the elements 2j and 2j + 1 of token i, of values the element j of the tokens 2i and 2i + 1.
        line: (offsets, token, number, head_offset, row_stride) -> the offset of cache line `number` from those of
            `token` of a tile on, whose tokens have num_lines lines each, one after another. token is 0 modulo
            PACKED_TOKENS where keys are packed.
        num_lines: Cache lines of a token; of packed keys, PACKED_TOKENS tokens together have so many each.
    """

    slot_offset: Callable[..., Expr]
    element: Callable[..., Expr]
    pair: Callable[..., Expr]
    line: Callable[..., Expr]
    num_lines: int


def key_access(spec: PagedAttentionSpec, tiling: Tiling) -> CacheAccess:
    """How key_cache is read."""
    if spec.kv_layout != "packed":
        return _token_rows(spec, tiling)
    elements, rows = tiling.word_elements, spec.head_dim // tiling.word_elements
    lines = -(-rows // PACKED_TOKENS)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", slot - T.floormod(slot, PACKED_TOKENS))

    def element(cache: Buffer, offsets: Buffer, t: Expr, head_offset: Expr, row_stride: Expr, d: Expr) -> Expr:
        return _element(elements, pair(cache, offsets, t, head_offset, row_stride, T.floordiv(d, elements)), d)

    def pair(cache: Buffer, offsets: Buffer, t: Expr, head_offset: Expr, row_stride: Expr, row: Expr) -> Expr:
        first = T.floordiv(t, PACKED_TOKENS) * PACKED_TOKENS
        return cache[offsets[first] + head_offset + T.Cast("int64", row) * row_stride + T.Cast("int64", t - first)]

    def line(offsets: Buffer, token: Expr, number: Expr, head_offset: Expr, row_stride: Expr) -> Expr:
        # a line holds one row of PACKED_TOKENS tokens; numbers past the last row name it again
        first = token + T.floordiv(number, lines * PACKED_TOKENS) * PACKED_TOKENS
        row = T.min(T.floormod(number, lines * PACKED_TOKENS), rows - 1)
        return offsets[first] + head_offset + T.Cast("int64", row) * row_stride

    return CacheAccess(slot_offset, element, pair, line, lines)


def value_access(spec: PagedAttentionSpec, tiling: Tiling) -> CacheAccess:
    """How value_cache is read."""
    if spec.kv_layout != "packed" or spec.packed_pair == 1:
        return _token_rows(spec, tiling)._replace(pair=_pair_of_rows)
    elements = tiling.word_elements
    lines = -(-spec.head_dim // tiling.line_elements)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", T.floordiv(slot, elements)) * row_stride

    def element(cache: Buffer, offsets: Buffer, t: Expr, head_offset: Expr, row_stride: Expr, d: Expr) -> Expr:
        return _element(elements, cache[offsets[t] + head_offset + T.Cast("int64", d)], t)

    def pair(cache: Buffer, offsets: Buffer, i: Expr, head_offset: Expr, row_stride: Expr, d: Expr) -> Expr:
        return cache[offsets[2 * i] + head_offset + T.Cast("int64", d)]

    def line(offsets: Buffer, token: Expr, number: Expr, head_offset: Expr, row_stride: Expr) -> Expr:
        # of the lines of a pair's row, its first token names the first half and its second one the other
        token = token + T.floordiv(number, lines)
        line_of_pair = T.floormod(token, elements) * lines + T.floormod(number, lines)
        return offsets[token] + head_offset + T.Cast("int64", line_of_pair * (tiling.line_elements // elements))

    return CacheAccess(slot_offset, element, pair, line, lines)


def _token_rows(spec: PagedAttentionSpec, tiling: Tiling) -> CacheAccess:
    """A cache whose rows are tokens; a pair is of one of them."""
    elements, lines = tiling.word_elements, -(-spec.head_dim // tiling.line_elements)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", slot) * row_stride

    def element(cache: Buffer, offsets: Buffer, t: Expr, head_offset: Expr, row_stride: Expr, d: Expr) -> Expr:
        return _element(elements, _word(cache, offsets, t, head_offset, row_stride, T.floordiv(d, elements)), d)

    def line(offsets: Buffer, token: Expr, number: Expr, head_offset: Expr, row_stride: Expr) -> Expr:
        start = T.Cast("int64", T.floormod(number, lines) * (tiling.line_elements // elements))
        return offsets[token + T.floordiv(number, lines)] + head_offset + start

    return CacheAccess(slot_offset, element, _word, line, lines)


def _word(cache: Buffer, offsets: Buffer, t: Expr, head_offset: Expr, row_stride: Expr, word: Expr) -> Expr:
    """A word of a token's row."""
    return cache[offsets[t] + head_offset + T.Cast("int64", word)]


def _pair_of_rows(cache: Buffer, offsets: Buffer, i: Expr, head_offset: Expr, row_stride: Expr, d: Expr) -> Expr:
    """Element d of the rows of the tokens 2i and 2i + 1."""
    first = _word(cache, offsets, 2 * i, head_offset, row_stride, T.floordiv(d, 2))
    second = _word(cache, offsets, 2 * i + 1, head_offset, row_stride, T.floordiv(d, 2))
    return pair_halves(first, second, d)


def _element(elements: int, word: Expr, index: Expr) -> Expr:
    """The bfloat16 number `index` of a word that holds a pair, as float32; of other types the element itself."""
    return half(word, index) if elements == 2 else T.Cast("float32", word)


def cache_dtype(spec: PagedAttentionSpec, tiling: Tiling) -> str:
    """The type of the words that a kernel sees a cache as a span of."""
    return spec.dtype if tiling.word_elements == 1 else "int32"


def token_offsets(spec: PagedAttentionSpec, tiling: Tiling, access: CacheAccess) -> Callable[..., None]:
    """offsets[t] = words from the start of a cache to the token of column t of a tile, in kv head 0; int64.

    For t < num_offsets. The token of column t is tile_start + t, but in a whole tile of kv_tile tokens, where
    tiling.streams is more than 1, as in the sweeps of head_dim_in_lanes:

        tile_start + t % streams * (kv_tile // streams) + t // streams

    so that a tile is read from `streams` places in turn. Scores, probabilities and values of a tile then stand in this
    order, in which the whole tiles of a sequence differ from its last one. A maximum and a sum over a tile do not
    depend on it. What goes by a token's position does: nothing may be masked or added by its column t, as causality,
    a window or ALiBi would be in softmax_prepare, but the valid_len of a tile that is not whole.

    Past last_token the last valid token is named again: an offset is always that of a token within the sequence's
    length, so that whatever is read through the table may be read. Products with a stride are int64: caches of more
    than 2**31 elements are ordinary.
    """
    block_size, size = spec.block_size, tiling.num_offsets
    kv_tile, streams = tiling.kv_tile, tiling.streams

    @inline
    def stage(block_table, offsets, seq, tile_start, last_token, num_offsets, block_stride, row_stride):
        with T.sblock("token_offsets"):
            T.reads(block_table[seq, 0 : block_table.shape[1]])
            T.writes(offsets[0:size])
            for t in range(num_offsets):
                with T.sblock("offset"):
                    vt = T.axis.spatial(size, t)
                    if streams > 1:
                        in_turn: T.let = T.floormod(vt, streams) * (kv_tile // streams) + T.floordiv(vt, streams)
                        whole_tile: T.let = tile_start + kv_tile - 1 <= last_token
                        position = T.meta_var(T.Select(whole_tile, in_turn, vt))
                    else:
                        position = T.meta_var(vt)
                    token: T.let = T.min(tile_start + position, last_token)
                    block: T.let = T.Cast("int64", block_table[seq, T.floordiv(token, block_size)])
                    slot: T.let = T.floormod(token, block_size)
                    offsets[vt] = block * block_stride + access.slot_offset(slot, row_stride)

    return stage


def load_tile(spec: PagedAttentionSpec, tiling: Tiling, access: CacheAccess, name: str) -> Callable[..., None]:
    """The sblock name: what load(tiling, access) reads, of num_groups groups of token_group tokens, in scratch.

    copy[t, d] = float32(element d of token t); or, in pairs, the word of element d of the tokens 2t and 2t + 1.
    """
    head_dim, group = spec.head_dim, tiling.token_group // tiling.dot_elements
    tokens = tiling.padded_kv_tile // tiling.dot_elements
    read = load(tiling, access)

    @inline
    def stage(cache, cache_offsets, copy, head_offset, row_stride, num_groups):
        with T.sblock(name):
            T.reads(whole(cache), cache_offsets[0 : tiling.num_offsets])
            T.writes(copy[0:tokens, 0:head_dim])
            for to, ti, d in T.grid(num_groups, group, head_dim):
                with T.sblock(f"{name}_element"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vd = T.axis.spatial(head_dim, d)
                    T.reads(whole(cache), cache_offsets[0 : tiling.num_offsets])
                    T.writes(copy[vt, vd])
                    copy[vt, vd] = read(cache, cache_offsets, vt, head_offset, row_stride, vd)

    return stage


def load(tiling: Tiling, access: CacheAccess) -> Callable[..., Expr]:
    """access.element, or access.pair where the matmuls multiply pairs."""
    return access.pair if tiling.dot_pairs else access.element


def load_copied(copy: Buffer, offsets: Buffer, t: Expr, head_offset: Expr, row_stride: Expr, d: Expr) -> Expr:
    """The same of what load_tile made."""
    return copy[t, d]


def whole(buffer: Buffer) -> BufferRegion:
    """All of a buffer, for T.reads and T.writes."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def prefetch(cache: Buffer, offset: Expr) -> Expr:
    """Ask for the line of an element, to be read soon: into the second-level cache.

    Not tirx.prefetch, which becomes the same, but whose text TVM's parser does not read back.
    """
    read, second_level, data = 0, 2, 1
    return T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(cache[offset]), read, second_level, data)
