"""Rows of four tokens turned: words of four codes of 4 bits, one of each token, which dot products of bytes take.

Four rows are turned by shuffles that stay within 16 bytes, as those of a byte each are, and by no others. So a copy has
the elements of a row in another order, that of `place_of`, and so have the sums that are made of it, until they become
outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.caches import Cache, copy_shape, load_tile, value_access, whole, word_of
from pa_compiler.kernels.elements import LARGEST_CODE, four_integers
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import CODES_OF_WORD, Tiling
from pa_compiler.tvmscript import inline

TOKENS = 4
"""Of which a word has a code each."""

_BYTES = CODES_OF_WORD // 2


def place_of(lanes: int) -> Callable[[Expr], Expr]:
    """Where a copy has an element of a row, whose words are turned so many at a time."""

    def place(d: Expr) -> Expr:
        word, byte, odd = T.floordiv(d, CODES_OF_WORD), T.floormod(T.floordiv(d, 2), _BYTES), T.floormod(d, 2)
        lane = T.floordiv(T.floormod(word, lanes), _BYTES) * _BYTES + byte
        vector = T.floordiv(word, lanes) * CODES_OF_WORD + T.floormod(word, _BYTES) * 2 + odd
        return vector * lanes + lane

    return place


def turned_codes(rows: list[Expr], lane: Expr, odd: Expr) -> Expr:
    """The word of a code of each of four words: of the byte that a lane has, the lower or the upper half."""
    bits = T.floormod(lane, _BYTES) * 8 + odd * 4
    return four_integers(*(T.bitwise_and(T.shift_right(row, bits), LARGEST_CODE) for row in rows))


def copied_values(spec: PagedAttentionSpec, tiling: Tiling) -> tuple[tuple[int, ...], Callable[..., None]]:
    """The shape of decode's copy of a tile of values, and the sblock load_values, which makes it.

    In fours, where these are multiplied, of all heads that go from scores to outputs at once.
    """
    shape = copy_shape(tiling, tiling.values, spec.result_dim)
    if not tiling.values.turned:
        return shape, load_tile(tiling, value_access(spec, tiling), tiling.values, shape, "load_values")
    heads = spec.num_kv_heads if tiling.sweep else 1
    return (heads, *shape), _load_fours(spec, tiling, heads)


def of_copy(values: Cache, head_offset: Expr, copy: Buffer) -> tuple[Cache, Expr]:
    """A cache and the offset of a head in it, as what copied_values has made of it: in fours heads are counted."""
    if len(copy.shape) == 2:
        return values._replace(memory=copy), head_offset
    return values._replace(memory=copy, head=T.int64(1)), T.int64(0)


def _load_fours(spec: PagedAttentionSpec, tiling: Tiling, heads: int) -> Callable[..., None]:
    """The sblock load_values: copy[h, p, place_of(d)] = the word of element d of the tokens 4p to 4p + 3 of head h.

    Of the heads from head_offset on, and of num_groups groups of token_group tokens. The rows are copied first, as they
    are.
    """
    tokens, lanes = tiling.padded_kv_tile, tiling.values.turned
    words, group = spec.result_dim // CODES_OF_WORD, tiling.token_group // TOKENS

    @inline
    def stage(cache, copy, head_offset, num_groups):
        with T.sblock("load_values"):
            T.reads(whole(cache.memory), whole(cache.offsets))
            T.writes(copy[0:heads, 0 : tokens // TOKENS, 0 : words * CODES_OF_WORD])
            rows = T.sblock_alloc_buffer((heads, tokens // TOKENS, TOKENS, words), "int32")
            for h, to, ti, k, w in T.grid(heads, num_groups, group, TOKENS, words):
                with T.sblock("load_rows"):
                    vp = T.axis.spatial(tokens // TOKENS, to * group + ti)
                    vh, vk, vw = T.axis.remap("SSS", [h, k, w])
                    now = T.meta_var(head_offset + T.Cast("int64", vh) * cache.head)
                    T.reads(whole(cache.memory), whole(cache.offsets))
                    T.writes(rows[vh, vp, vk, vw])
                    rows[vh, vp, vk, vw] = word_of(cache, vp * TOKENS + vk, now, vw)
            for h, to, ti, c, j, odd, lane in T.grid(heads, num_groups, group, words // lanes, _BYTES, 2, lanes):
                with T.sblock("turned"):
                    vp = T.axis.spatial(tokens // TOKENS, to * group + ti)
                    vh, vc, vj, vodd, vlane = T.axis.remap("SSSSS", [h, c, j, odd, lane])
                    word = T.meta_var(vc * lanes + T.floordiv(vlane, _BYTES) * _BYTES + vj)
                    copy[vh, vp, ((vc * _BYTES + vj) * 2 + vodd) * lanes + vlane] = turned_codes(
                        [rows[vh, vp, k, word] for k in range(TOKENS)], vlane, vodd
                    )

    return stage
