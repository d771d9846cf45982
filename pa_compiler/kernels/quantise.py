"""append_kv into caches of float8: each element of a key or a value as a code of 8 bits, to the nearest, ties to even.

A number x of a head becomes the code that is nearest to x / scale, one division in float32, among those that there are:
what lies beyond the largest becomes the largest, infinities too. A NaN becomes NaN with its sign, as does 0 / 0; what a
scale of 0 divides otherwise is infinite. Codes with a scale for each token are in quantise_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import INFINITE, MAGNITUDE
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec

_FLOAT8 = {"float8_e4m3fn": (3, 7, 0x7E, 0x7F), "float8_e5m2": (2, 15, 0x7B, 0x7E)}
"""Bits of the significand, the bias of the exponent, the largest finite code and NaN."""


def quantise(
    spec: PagedAttentionSpec, name: str, dim: int, extents: Sequence[int], place: Callable[..., tuple[Expr, ...]]
) -> PrimFunc:
    """The PrimFunc name(new, cache, slot_mapping, scale, s_block, s_row, s_head, head_begin, num_heads).

    As append_kv's, with new in dtype and cache as bytes. scale: [s_span], float32, where the scale of a head in a slot
    is the one at block * s_block + slot * s_row + head * s_head.
    """
    kv_heads, block_size = T.int64(spec.num_kv_heads), T.int64(spec.block_size)
    first, second, third = (T.int64(extent) for extent in extents)
    code, itemsize = float8_code(spec.cache_dtype), ITEMSIZES[spec.dtype]

    @script.prim_func(s_tir=True)
    def append(
        new_handle: T.handle,
        cache_handle: T.handle,
        slot_mapping_handle: T.handle,
        scale_handle: T.handle,
        s_block: T.int64,
        s_row: T.int64,
        s_head: T.int64,
        head_begin: T.int32,
        num_heads: T.int32,
    ):
        num_tokens, num_blocks, s_span = T.int64(), T.int64(), T.int64()
        new_token, new_head = T.int64(), T.int64()
        cache_0, cache_1, cache_2 = T.int64(), T.int64(), T.int64()
        new = T.match_buffer(
            new_handle, (num_tokens, kv_heads, T.int64(dim)), spec.dtype, strides=[new_token, new_head, T.int64(1)],
            align=itemsize,
        )  # fmt: skip
        cache = T.match_buffer(
            cache_handle, (num_blocks, first, second, third), "uint8",
            strides=[cache_0, cache_1, cache_2, T.int64(1)], align=1,
        )  # fmt: skip
        slot_mapping = T.match_buffer(slot_mapping_handle, (num_tokens,), "int64", align=8)
        scale = T.match_buffer(scale_handle, (s_span,), "float32", align=4)
        for h, t in T.grid(num_heads, num_tokens):
            with T.sblock("quantised_token"):
                vh = T.axis.opaque(num_heads, h)
                vt = T.axis.opaque(num_tokens, t)
                T.reads()
                T.writes()
                factor = T.sblock_alloc_buffer((1,), "float32")
                target: T.let = slot_mapping[vt]
                if target >= T.int64(0):
                    head: T.let = T.Cast("int64", head_begin + vh)
                    block: T.let = T.truncdiv(target, block_size)
                    slot: T.let = T.truncmod(target, block_size)
                    at: T.let = block * s_block + slot * s_row + head * s_head
                    with T.sblock("row_scale"):
                        T.reads(scale[0:s_span])
                        T.writes(factor[0])
                        factor[0] = scale[at]
                    for d in range(dim):
                        with T.sblock("code"):
                            vd = T.axis.spatial(dim, d)
                            T.reads(new[vt, head, vd], factor[0])
                            T.writes(cache[0:num_blocks, 0:first, 0:second, 0:third])
                            where = T.meta_var(place(block, slot, head, vd))
                            cache[where[0], where[1], where[2], where[3]] = code(
                                T.Cast("float32", new[vt, head, vd]) / factor[0]
                            )

    return append.with_attr("global_symbol", name)


def float8_code(dtype: str) -> Callable[[Expr], Expr]:
    """x / scale, float32 -> its code as a byte."""
    digits, bias, largest, nan = _FLOAT8[dtype]
    dropped = 23 - digits
    smallest = 127 - bias + 1  # the exponent, as float32 has it, of the smallest normal number
    # a float32 whose last bit counts as much as that of the subnormal numbers
    whole = 2.0 ** (smallest + dropped - 127)

    def code(quotient: Expr) -> Expr:
        bits = T.reinterpret("int32", quotient)
        magnitude = T.bitwise_and(bits, MAGNITUDE)
        odd = T.bitwise_and(T.shift_right(magnitude, dropped), 1)
        normal = T.shift_right(magnitude + ((1 << (dropped - 1)) - 1) + odd, dropped) - ((127 - bias) << digits)
        raised = T.reinterpret("float32", magnitude) + T.float32(whole)
        subnormal = T.reinterpret("int32", raised) - ((smallest + dropped) << 23)
        rounded = T.Select(magnitude < (smallest << 23), subnormal, normal)
        finite = T.min(rounded, largest)
        found = T.Select(magnitude > INFINITE, nan, finite)
        return T.Cast("uint8", T.bitwise_or(found, T.bitwise_and(T.shift_right(bits, 24), 0x80)))

    return code
