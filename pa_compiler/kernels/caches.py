"""Where the words of keys and values lie in the paged caches: the one place that knows the layouts.

A kernel sees a cache as one span of memory with three strides: of its blocks, of its heads, and of the rows in a block
of one head. In NHD and HND a row is a token, and the two differ in nothing else. Packed, a row of the keys is an
element of head_dim (bfloat16: a pair of them), a row of the values is a token (bfloat16: a pair of tokens). A word is
made a number, or multiplied as it is, by elements.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.kernels.elements import four_codes, number, pair_halves, paired
from pa_compiler.spec import PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import CODES_OF_WORD, TILE_TOKENS, Element, Tiling
from pa_compiler.tvmscript import inline


class Cache(NamedTuple):
    """Keys or values as the stages see them, in one kernel.

    Attributes:
        memory: The words: of the cache itself, or, [tokens, dim], what load_tile has made of a tile of one head.
        block, row, head: The strides of blocks, of rows and of heads, in words, int64.
        offsets: Where the tokens of a tile lie, as token_offsets has it: in words, in kv head 0, int64.
    """

    memory: Buffer
    block: Expr
    row: Expr
    head: Expr
    offsets: Buffer


class CacheAccess(NamedTuple):
    """How one of the two caches is read: functions for the bodies of the stages. Offsets are in words, int64.

    Attributes:
        slot_offset: (slot, row_stride) -> from the start of a block to the slot's token, or, of packed keys, to the
            PACKED_TOKENS tokens that it is one of. What a table of offsets holds.
        element: (cache, t, head_offset, d) -> element d of token t as float32.
        pair: (cache, i, head_offset, j) -> a word of two elements, where a matmul multiplies such: of keys the elements
            2j and 2j + 1 of token i, or, where they are apart and no integers, j and j + head_dim / 2, so that both
            are read in vectors; of values the element j of the tokens 2i and 2i + 1. Of four the word of those of key i
            that elements_of_operand says.
        line: (cache, token, nth, head_offset) -> the offset of the nth cache line, counted from the first one of
            `token` of a tile; each token has num_lines of them. token is 0 modulo PACKED_TOKENS where keys are packed.
        num_lines: Cache lines of a token; of packed keys, PACKED_TOKENS tokens together have so many each.
    """

    slot_offset: Callable[..., Expr]
    element: Callable[..., Expr]
    pair: Callable[..., Expr]
    line: Callable[..., Expr]
    num_lines: int


def elements_of_operand(keys: Element, head_dim: int, j: Expr) -> tuple[Expr, ...]:
    """The elements of head_dim that pair, or four, j of a key is of."""
    if keys.terms == 4:
        first = T.floordiv(j, 2) * CODES_OF_WORD + T.floormod(j, 2)
        return tuple(first + 2 * i for i in range(4))
    return (j, j + head_dim // 2) if keys.apart and not keys.integers else (2 * j, 2 * j + 1)


def key_access(spec: PagedAttentionSpec, tiling: Tiling) -> CacheAccess:
    """How key_cache is read."""
    keys = tiling.keys
    if tiling.rows_in_place:
        return _rows_in_step(keys, spec.head_dim)
    if spec.kv_layout != "packed":
        return _token_rows(keys, spec.head_dim)
    rows, of_line = spec.head_dim // keys.word, keys.rows_of_line
    lines = -(-rows // (PACKED_TOKENS * of_line))
    # blocks of so few tokens have several rows side by side in a line, others several groups of tokens of a row
    side_by_side = max(of_line * PACKED_TOKENS // spec.block_size, 1)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", slot - T.floormod(slot, PACKED_TOKENS))

    def element(cache: Cache, t: Expr, head_offset: Expr, d: Expr) -> Expr:
        return number(keys, pair(cache, t, head_offset, T.floordiv(d, keys.word)), d)

    def pair(cache: Cache, t: Expr, head_offset: Expr, row: Expr) -> Expr:
        first = T.floordiv(t, PACKED_TOKENS) * PACKED_TOKENS
        in_row = T.Cast("int64", row) * cache.row + T.Cast("int64", t - first)
        return cache.memory[cache.offsets[first] + head_offset + in_row]

    def apart(cache: Cache, t: Expr, head_offset: Expr, j: Expr) -> Expr:
        return paired(keys, *(pair(cache, t, head_offset, each) for each in elements_of_operand(keys, rows, j)))

    def line(cache: Cache, token: Expr, nth: Expr, head_offset: Expr) -> Expr:
        # a line holds one row of PACKED_TOKENS tokens; what is past the last row is it again
        first = token + T.floordiv(nth, lines * PACKED_TOKENS) * PACKED_TOKENS
        row = T.floormod(nth, lines * PACKED_TOKENS)
        if of_line > 1:  # groups of tokens whose rows share lines fetch different ones
            row = row * of_line + T.floormod(T.floordiv(first, PACKED_TOKENS) * side_by_side, of_line)
        row = T.min(row, rows - 1)
        return cache.offsets[first] + head_offset + T.Cast("int64", row) * cache.row

    return CacheAccess(slot_offset, element, apart if keys.apart else pair, line, lines)


def value_access(spec: PagedAttentionSpec, tiling: Tiling) -> CacheAccess:
    """How value_cache is read."""
    values = tiling.values
    if tiling.rows_in_place:
        return _rows_in_step(values, spec.result_dim)
    if spec.kv_layout != "packed" or spec.packed_pair == 1:
        of_codes = functools.partial(_pair_of_codes, values)
        return _token_rows(values, spec.result_dim)._replace(pair=of_codes if values.apart else _pair_of_rows)
    lines = -(-spec.result_dim // values.line_elements)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", T.floordiv(slot, values.word)) * row_stride

    def element(cache: Cache, t: Expr, head_offset: Expr, d: Expr) -> Expr:
        return number(values, word_of(cache, t, head_offset, d), t)

    def pair(cache: Cache, i: Expr, head_offset: Expr, d: Expr) -> Expr:
        return word_of(cache, 2 * i, head_offset, d)

    def line(cache: Cache, token: Expr, nth: Expr, head_offset: Expr) -> Expr:
        # a row has a pair of tokens and twice the lines: its even token stands for the first half, its odd one for the
        # second
        token = token + T.floordiv(nth, lines)
        line_of_pair = T.floormod(token, values.word) * lines + T.floormod(nth, lines)
        return cache.offsets[token] + head_offset + T.Cast("int64", line_of_pair * values.line_words)

    return CacheAccess(slot_offset, element, pair, line, lines)


def _token_rows(of: Element, dim: int) -> CacheAccess:
    """A cache whose rows are tokens; a pair is of one of them."""
    lines = -(-dim // of.line_elements)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", slot) * row_stride

    def element(cache: Cache, t: Expr, head_offset: Expr, d: Expr) -> Expr:
        return number(of, word_of(cache, t, head_offset, T.floordiv(d, of.word)), d)

    def line(cache: Cache, token: Expr, nth: Expr, head_offset: Expr) -> Expr:
        start = T.Cast("int64", T.floormod(nth, lines) * of.line_words)
        return cache.offsets[token + T.floordiv(nth, lines)] + head_offset + start

    def apart(cache: Cache, t: Expr, head_offset: Expr, j: Expr) -> Expr:
        return paired(of, *(word_of(cache, t, head_offset, each) for each in elements_of_operand(of, dim, j)))

    def four(cache: Cache, t: Expr, head_offset: Expr, j: Expr) -> Expr:
        return four_codes(word_of(cache, t, head_offset, T.floordiv(j, 2)), j)

    return CacheAccess(slot_offset, element, four if of.terms == 4 else apart if of.apart else word_of, line, lines)


def _rows_in_step(of: Element, dim: int) -> CacheAccess:
    """The same where TILE_TOKENS rows of a block are read at once: a token's offset is that of the first of them."""
    rows = _token_rows(of, dim)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", slot - T.floormod(slot, TILE_TOKENS)) * row_stride

    def in_step(cache: Cache, t: Expr) -> Expr:
        return T.Cast("int64", T.floormod(t, TILE_TOKENS)) * cache.row

    def element(cache: Cache, t: Expr, head_offset: Expr, d: Expr) -> Expr:
        return rows.element(cache, t, head_offset + in_step(cache, t), d)

    def pair(cache: Cache, t: Expr, head_offset: Expr, word: Expr) -> Expr:
        return word_of(cache, t, head_offset + in_step(cache, t), word)

    def line(cache: Cache, token: Expr, nth: Expr, head_offset: Expr) -> Expr:
        return rows.line(cache, token, nth, head_offset) + in_step(cache, token + T.floordiv(nth, rows.num_lines))

    return CacheAccess(slot_offset, element, pair, line, rows.num_lines)


def word_of(cache: Cache, t: Expr, head_offset: Expr, word: Expr) -> Expr:
    """A word of a token's row."""
    return cache.memory[cache.offsets[t] + head_offset + T.Cast("int64", word)]


def _pair_of_rows(cache: Cache, i: Expr, head_offset: Expr, d: Expr) -> Expr:
    """Element d of the rows of the tokens 2i and 2i + 1."""
    first = word_of(cache, 2 * i, head_offset, T.floordiv(d, 2))
    second = word_of(cache, 2 * i + 1, head_offset, T.floordiv(d, 2))
    return pair_halves(first, second, d)


def _pair_of_codes(of: Element, cache: Cache, i: Expr, head_offset: Expr, d: Expr) -> Expr:
    """The same where each element is a word."""
    return paired(of, word_of(cache, 2 * i, head_offset, d), word_of(cache, 2 * i + 1, head_offset, d))


def rows_from(cache: Cache, first: Expr, row: Expr, head_offset: Expr, d: Expr) -> Expr:
    """Word d of a row of the cache, counted from that of the token in column `first` on, in its block."""
    in_block = T.Cast("int64", row) * cache.row + T.Cast("int64", d)
    return cache.memory[cache.offsets[first] + head_offset + in_block]


def reader(access: CacheAccess, element: Element, copied: bool) -> Callable[[Cache, Expr, Expr, Expr], Expr]:
    """What a matmul multiplies: (cache, t, head_offset, d) -> an element, or a pair; of load_tile's copy if copied.

    Of words that are turned (fours.py) a copy has those of some heads, and head_offset says of which.
    """
    if element.turned:
        return lambda cache, t, head_offset, d: cache.memory[T.Cast("int32", head_offset), t, d]
    if copied:
        return lambda cache, t, head_offset, d: cache.memory[t, d]
    return access.element if element.terms == 1 else access.pair


def copy_shape(tiling: Tiling, element: Element, dim: int) -> tuple[int, int]:
    """The shape of a tile of tokens that load_tile converts."""
    return tiling.padded_kv_tile // element.terms, dim


def key_copy_shape(spec: PagedAttentionSpec, tiling: Tiling) -> tuple[int, int]:
    """The shape of a tile of keys that load_tile converts: where they are in pairs, these are of one token."""
    return tiling.padded_kv_tile, spec.head_dim // tiling.keys.terms


def load_tile(
    tiling: Tiling, access: CacheAccess, element: Element, shape: tuple[int, int], name: str
) -> Callable[..., None]:
    """The sblock name: what reader(access, element) reads, of num_groups groups of token_group tokens, in scratch.

    copy[t, d] = float32(element d of token t), or, in pairs, CacheAccess.pair(t, d): as shape is copy_shape or
    key_copy_shape.
    """
    tokens, dim = shape
    group = tiling.token_group * tokens // tiling.padded_kv_tile
    read = reader(access, element, copied=False)

    @inline
    def stage(cache, copy, head_offset, num_groups):
        with T.sblock(name):
            T.reads(whole(cache.memory), whole(cache.offsets))
            T.writes(copy[0:tokens, 0:dim])
            for to, ti, d in T.grid(num_groups, group, dim):
                with T.sblock(f"{name}_element"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vd = T.axis.spatial(dim, d)
                    T.reads(whole(cache.memory), whole(cache.offsets))
                    T.writes(copy[vt, vd])
                    copy[vt, vd] = read(cache, vt, head_offset, vd)

    return stage


def whole(buffer: Buffer) -> BufferRegion:
    """All of a buffer, for T.reads and T.writes."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]
