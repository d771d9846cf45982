"""Values that are no finite numbers, where a tensor core would multiply them for rows that do not see them too.

0 times infinity is NaN, so a weight of 0 does not keep such a value out. It is replaced by 0, and a product of its own
says which rows see it: of the same weights with 1 where a value is infinite upwards or NaN, and another for downwards
or NaN. A row whose product is more than 0 gets that infinity; both of them add up to NaN. Where all values are finite
no bit of a result changes.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.tiles import TensorCoreTiling
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""The bits of the exponent, which are all ones in what is not finite; infinity has no others but its sign."""

_ONE = {"bfloat16": 0x3F80, "float16": 0x3C00}
_SIGN = 0x8000


def isolate(spec: PagedAttentionSpec, tiling: TensorCoreTiling, mma: str) -> Callable[..., None]:
    """Leave 0 in v_frag[4], elements k of 16 tokens, for what is not finite, and add it to acc of the rows that see it.

    Warp-wide; p_frag from `weights` on are the weights of these tokens, of all tiles of rows.
    """
    tiles, depth = tiling.mma_tiles, spec.result_dim // 16
    infinity = float("inf")

    def halves(word: Expr, value_of: Callable[[Expr], Expr]) -> Expr:
        """The word of what value_of gives for its two halves, the upper one as if it were the lower."""
        low, high = T.bitwise_and(word, T.uint32(0xFFFF)), T.shift_right(word, T.uint32(16))
        return T.bitwise_or(value_of(low), T.shift_left(value_of(high), T.uint32(16)))

    def is_finite(half: Expr) -> Expr:
        exponent = T.uint32(_EXPONENT[spec.dtype])
        return T.bitwise_and(half, exponent) != exponent

    def finite(half: Expr) -> Expr:
        return T.Select(is_finite(half), half, T.uint32(0))

    def indicated(other: int) -> Callable[[Expr], Expr]:
        """1 for a half that is neither finite nor the infinity `other`."""
        one = T.uint32(_ONE[spec.dtype])
        return lambda half: T.Select(T.Or(is_finite(half), half == T.uint32(other)), T.uint32(0), one)

    upwards, downwards = _EXPONENT[spec.dtype], _EXPONENT[spec.dtype] | _SIGN

    @inline
    def stage(v_frag, p_frag, weights, k, state):
        cleaned = T.alloc_buffer((4,), "uint32", scope="local")
        for i in T.unroll(4):
            cleaned[i] = halves(v_frag[i], finite)
        differs: T.bool = T.Or(
            T.Or(cleaned[0] != v_frag[0], cleaned[1] != v_frag[1]),
            T.Or(cleaned[2] != v_frag[2], cleaned[3] != v_frag[3]),
        )
        anywhere: T.let = T.cuda.ballot_sync(T.uint32(ALL_LANES), T.Cast("int32", differs))
        if anywhere != T.uint32(0):
            marks = T.alloc_buffer((4,), "uint32", scope="local")
            seen = T.alloc_buffer((4,), "float32", scope="local")
            for way in T.unroll(2):
                for i in T.unroll(4):
                    marks[i] = T.Select(
                        way == 0, halves(v_frag[i], indicated(downwards)), halves(v_frag[i], indicated(upwards))
                    )
                for n in T.unroll(tiles):
                    for i in T.unroll(4):
                        seen[i] = T.float32(0)
                    p = T.meta_var(weights + n * 2)
                    T.ptx[mma](
                        seen[0], seen[1], seen[2], seen[3], marks[0], marks[1], marks[2], marks[3],
                        p_frag[p], p_frag[p + 1], seen[0], seen[1], seen[2], seen[3],
                    )  # fmt: skip
                    for i in T.unroll(4):
                        a = T.meta_var((n * depth + k) * 4 + i)
                        added = T.meta_var(T.Select(way == 0, T.float32(infinity), T.float32(-infinity)))
                        state.acc[a] = state.acc[a] + T.Select(seen[i] > T.float32(0), added, T.float32(0))
            for i in T.unroll(4):
                v_frag[i] = cleaned[i]

    return stage
