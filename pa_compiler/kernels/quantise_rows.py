"""append_kv into caches of int8 and int4: a key or a value of a head becomes codes that have a scale of their own.

A number becomes the code that is nearest to it, ties to even, by one division in float32. Where the spec rotates them,
the numbers are those of H @ row (rotation.py), and scale and zero point are multiplied by 1 / sqrt(dim) at the end.

int8: scale = max |x| / 127, codes x / scale from -127 to 127. int4: scale = (max - min) / 15, the zero point is min,
codes (x - min) / scale from 0 to 15; two lie in a byte, the even one low. Where a scale is 0, of a row of equal
numbers, of 0 or of nearly the smallest, all codes are 0: the row reads as min, or as 0. With an infinity or a NaN among
the numbers, or where max - min is beyond float32, the scale is infinite or NaN, the zero point the same, and all codes
are 0: the row reads as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.elements import INFINITE, MAGNITUDE
from pa_compiler.kernels.rotation import rotate, unit
from pa_compiler.kv_types import LARGEST
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tvmscript import inline

_WHOLE = 12582912.0
"""1.5 * 2**23: added to a float32 below 2**22, it leaves the nearest whole number in the low bits."""
_WHOLE_BITS = 0x4B400000
"""Its bits."""
_PEAKS = 16
"""Maxima of a row that are taken side by side, at most, before that of these."""


_Place = Callable[..., tuple[Expr, ...]]


def quantise_rows(
    spec: PagedAttentionSpec, name: str, dim: int, extents: Sequence[int], place: _Place, in_rows: bool
) -> PrimFunc:
    """The PrimFunc name(new, cache, slot_mapping, scale, s_block, s_row, s_head, head_begin, num_heads).

    As append_kv's, with new in dtype and cache as bytes. scale: [s_span], float32, where the scale of a head in a slot
    is written at block * s_block + slot * s_row + head * s_head, and after it the zero point, where there is one.
    place says where an element lies; of two in a byte, in elements of the last axis. in_rows: whether the two are of
    one row.
    """
    kv_heads, block_size = T.int64(spec.num_kv_heads), T.int64(spec.block_size)
    first, second, third = (T.int64(extent) for extent in extents)
    itemsize, rotates = ITEMSIZES[spec.dtype], spec.rotates
    measure = (_measure_range if spec.has_zeros else _measure_peak)(dim)
    store = (_store_pairs if in_rows else _store_halves) if spec.codes_of_byte == 2 else _store_bytes
    store_codes = store(place, dim)
    factor = unit(dim) if rotates else 1.0

    def element_of(new, token, head):
        return lambda _, d: (T.Cast("float32", new[token, head, d]), [new[token, head, d]])

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
                if not rotates:
                    row = T.sblock_alloc_buffer((1, dim), "float32")
                found = T.sblock_alloc_buffer((2,), "float32")
                target: T.let = slot_mapping[vt]
                if target >= T.int64(0):
                    head: T.let = T.Cast("int64", head_begin + vh)
                    block: T.let = T.truncdiv(target, block_size)
                    slot: T.let = T.truncmod(target, block_size)
                    at: T.let = block * s_block + slot * s_row + head * s_head
                    if rotates:
                        rotated = T.meta_var(rotate("new", element_of(new, vt, head), 1, dim))
                    else:
                        for d in range(dim):
                            with T.sblock("row"):
                                vd = T.axis.spatial(dim, d)
                                row[0, vd] = T.Cast("float32", new[vt, head, vd])
                    of_row = T.meta_var(rotated if rotates else row)
                    measure(of_row, found)
                    with T.sblock("row_scale"):
                        T.reads(found[0:2])
                        T.writes(scale[0:s_span])
                        scale[at] = found[0] * T.float32(factor)
                        if spec.has_zeros:
                            is_finite = T.meta_var(_is_finite(found[0]))
                            scale[at + T.int64(1)] = T.Select(is_finite, found[1], found[0]) * T.float32(factor)
                    store_codes(of_row, found, cache, block, slot, head)

    return append.with_attr("global_symbol", name)


def _is_finite(x: Expr) -> Expr:
    return T.bitwise_and(T.reinterpret("int32", x), MAGNITUDE) < INFINITE


def _ordered(x: Expr) -> Expr:
    """The bits of a float32 as an integer that orders as the numbers do, NaN before or after all of them."""
    bits = T.reinterpret("int32", x)
    return T.bitwise_xor(bits, T.bitwise_and(T.shift_right(bits, 31), MAGNITUDE))


def _magnitude(x: Expr) -> Expr:
    """The same of |x|."""
    return T.bitwise_and(T.reinterpret("int32", x), MAGNITUDE)


def _largest(name: str, dim: int, key: Callable[[Expr], Expr]) -> Callable[[Buffer, Buffer], None]:
    """(row, found) -> found[0] = the largest key(x) of a row: lane by lane, and then of these."""
    lanes = math.gcd(dim, _PEAKS)

    @inline
    def stage(row, found):
        peaks = T.sblock_alloc_buffer((lanes,), "int32")
        for step, lane in T.grid(dim // lanes, lanes):
            with T.sblock(f"{name}s"):
                vs = T.axis.reduce(dim // lanes, step)
                vl = T.axis.spatial(lanes, lane)
                with T.init():
                    peaks[vl] = T.int32(-(2**31))
                peaks[vl] = T.max(peaks[vl], key(row[0, vs * lanes + vl]))
        for lane in range(lanes):
            with T.sblock(name):
                vl = T.axis.reduce(lanes, lane)
                with T.init():
                    found[0] = T.int32(-(2**31))
                found[0] = T.max(found[0], peaks[vl])

    return stage


def _measure_peak(dim: int) -> Callable[[Buffer, Buffer], None]:
    """(row, found) -> found[0] = max |x| / 127."""
    find = _largest("peak", dim, _magnitude)

    @inline
    def stage(row, found):
        peak = T.sblock_alloc_buffer((1,), "int32")
        find(row, peak)
        with T.sblock("measured"):
            T.reads(peak[0])
            T.writes(found[0:2])
            found[0] = int8_scale(peak[0])
            found[1] = T.float32(0)

    return stage


def _measure_range(dim: int) -> Callable[[Buffer, Buffer], None]:
    """(row, found) -> found[0] = (max - min) / 15, found[1] = min."""
    find_top = _largest("peak", dim, _ordered)
    find_bottom = _largest("bottom", dim, lambda x: T.bitwise_not(_ordered(x)))

    def number(key):
        return T.reinterpret("float32", T.bitwise_xor(key, T.bitwise_and(T.shift_right(key, 31), MAGNITUDE)))

    @inline
    def stage(row, found):
        top = T.sblock_alloc_buffer((1,), "int32")
        bottom = T.sblock_alloc_buffer((1,), "int32")
        find_top(row, top)
        find_bottom(row, bottom)
        with T.sblock("measured"):
            T.reads(top[0], bottom[0])
            T.writes(found[0:2])
            least: T.let = number(T.bitwise_not(bottom[0]))
            found[0] = (number(top[0]) - least) / T.float32(LARGEST["int4"])
            found[1] = least

    return stage


def int8_scale(peak: Expr) -> Expr:
    """max |x| / 127, of the bits of max |x|, int32."""
    return T.reinterpret("float32", peak) / T.float32(LARGEST["int8"])


def int8_code(x: Expr, scale: Expr) -> Expr:
    """The code of a number, int32."""
    return _code(x, scale, -LARGEST["int8"], LARGEST["int8"])


def _code(x: Expr, scale: Expr, least: float, largest: float) -> Expr:
    """The whole number nearest to x / scale, int32; 0 where the scale is 0, infinite or NaN."""
    held = T.max(T.min(x / scale, T.float32(largest)), T.float32(least))
    code = T.reinterpret("int32", held + T.float32(_WHOLE)) - T.int32(_WHOLE_BITS)
    return T.Select(T.And(scale > T.float32(0), scale < T.float32("inf")), code, 0)


def _store_bytes(place: _Place, dim: int) -> Callable[..., None]:
    """(row, found, cache, block, slot, head) -> the codes of a row as bytes."""

    @inline
    def stage(row, found, cache, block, slot, head):
        for d in range(dim):
            with T.sblock("code"):
                vd = T.axis.spatial(dim, d)
                T.reads(row[0, vd], found[0])
                T.writes(whole(cache))
                where = T.meta_var(place(block, slot, head, vd))
                code = T.meta_var(T.bitwise_and(int8_code(row[0, vd], found[0]), 0xFF))
                cache[where[0], where[1], where[2], where[3]] = T.Cast("uint8", code)

    return stage


def _store_pairs(place: _Place, dim: int) -> Callable[..., None]:
    """The same as bytes of two elements of a row."""

    @inline
    def stage(row, found, cache, block, slot, head):
        for d in range(dim // 2):
            with T.sblock("code"):
                vd = T.axis.spatial(dim // 2, d)
                T.reads(row[0, vd * 2 : vd * 2 + 2], found[0:2])
                T.writes(whole(cache))
                where = T.meta_var(place(block, slot, head, vd * 2))
                even = T.meta_var(_nibble(row[0, vd * 2], found))
                odd = T.meta_var(_nibble(row[0, vd * 2 + 1], found))
                cache[where[0], where[1], where[2], T.floordiv(where[3], T.int64(2))] = T.Cast(
                    "uint8", T.bitwise_or(even, T.shift_left(odd, 4))
                )

    return stage


def _store_halves(place: _Place, dim: int) -> Callable[..., None]:
    """The same as halves of bytes whose other halves are of the slot beside it, and stay."""

    @inline
    def stage(row, found, cache, block, slot, head):
        places: T.let = T.Cast("int32", T.bitwise_and(slot, T.int64(1))) * 4
        for d in range(dim):
            with T.sblock("half_of_byte"):
                vd = T.axis.spatial(dim, d)
                T.reads(row[0, vd], found[0:2], whole(cache))
                T.writes(whole(cache))
                where = T.meta_var(place(block, slot, head, T.Cast("int64", vd)))
                byte = T.meta_var((where[0], where[1], where[2], T.floordiv(where[3], T.int64(2))))
                kept = T.meta_var(T.bitwise_and(T.Cast("int32", cache[byte]), T.shift_right(0xF0, places)))
                code = T.meta_var(T.shift_left(_nibble(row[0, vd], found), places))
                cache[byte] = T.Cast("uint8", T.bitwise_or(kept, code))

    return stage


def _nibble(x: Expr, found: Buffer) -> Expr:
    return _code(x - found[1], found[0], 0.0, LARGEST["int4"])
