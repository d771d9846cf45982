"""Numbers as integers of 16 bits, by which codes of int8 are multiplied: queries, and weights of values.

number = unit * integer, with one unit for each row. It is a power of two, by which the largest magnitude of a row is
from 2**14 on and below 2**15: numbers of as many digits lose nothing, and others are wrong by up to half of it. Of a
row that holds an infinity or a NaN it is NaN, and makes that of whatever it multiplies. Sums of products are exact in
int32: those of head_dim elements, and those of the tokens of a tile (cpu/tiles/basis.py has the room).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.elements import INFINITE, pair_integers
from pa_compiler.kernels.kept import allocate
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline

QUERY_GROUP = 16
"""Elements of a query that are taken at a time: head_dim is a multiple of it."""

_PLACES = 14
"""The largest magnitude is 2**_PLACES units or more."""
_BIAS = 127
_MANTISSA = 23
_MAGNITUDE = 0x7FFFFFFF
_NEARLY_TWO = 1 << (_MANTISSA - _PLACES - 1)
"""Added to bits: so that what would be rounded to 2**15 units has the next exponent."""
_LEAST = _PLACES + 1
"""The least exponent, as float32 stores it, of which the unit and what divides by it are normal numbers."""
_ROUND = 12582912.0
"""1.5 * 2**23: adding it leaves the nearest integer in the low bits of the significand, of either sign."""


def unit_of(bits: Expr) -> Expr:
    """The unit of numbers whose largest magnitude has these bits."""
    exponent = T.max(T.shift_right(bits + _NEARLY_TWO, _MANTISSA), _LEAST)
    unit = T.reinterpret("float32", T.shift_left(exponent - _PLACES, _MANTISSA))
    return T.Select(bits < INFINITE, unit, T.float32("nan"))


def integer_of(number: Expr, unit: Expr) -> Expr:
    """An int32 whose lower half is the integer of a number."""
    inverse = T.reinterpret("float32", T.int32(2 * _BIAS << _MANTISSA) - T.reinterpret("int32", unit))
    return T.reinterpret("int32", number * inverse + T.float32(_ROUND))


def allocate_units(tiling: Tiling, name: str, slots: int) -> Buffer | None:
    """A buffer [slots, rows] of units; None where no integers are multiplied."""
    return allocate(name, (slots, tiling.row_tile), "float32") if tiling.keys.integers else None


def to_integers(of: str, name: str, rows: int, columns: int, group: int) -> Callable[..., None]:
    """words[slot, r, i] of the integers of numbers(r, 2i) and numbers(r, 2i + 1), and units[slot, r].

    In the caller's sblock, for num_groups groups of columns. numbers(r, column) is an expression, and name that of the
    sblock of the words.
    """

    @inline
    def stage(numbers: Callable[[Expr, Expr], Expr], words: Buffer, units: Buffer, slot: Any, num_groups: Any):
        largest = T.sblock_alloc_buffer((rows,), "int32")
        integers = T.sblock_alloc_buffer((rows, columns), "int32")
        for r, to, ti in T.grid(rows, num_groups, group):
            with T.sblock(f"{of}_largest"):
                vt = T.axis.reduce(columns, to * group + ti)
                vr = T.axis.spatial(rows, r)
                with T.init():
                    largest[vr] = T.min_value("int32")
                largest[vr] = T.max(
                    largest[vr], T.bitwise_and(T.reinterpret("int32", numbers(vr, vt)), T.int32(_MAGNITUDE))
                )
        for r in range(rows):
            with T.sblock(f"{of}_unit"):
                vr = T.axis.spatial(rows, r)
                units[slot, vr] = unit_of(largest[vr])
        for r, to, ti in T.grid(rows, num_groups, group):
            with T.sblock(f"{of}_integers"):
                vt = T.axis.spatial(columns, to * group + ti)
                vr = T.axis.spatial(rows, r)
                integers[vr, vt] = integer_of(numbers(vr, vt), units[slot, vr])
        for r, to, ti in T.grid(rows, num_groups, group // 2):
            with T.sblock(name):
                vt = T.axis.spatial(columns // 2, to * (group // 2) + ti)
                vr = T.axis.spatial(rows, r)
                words[slot, vr, vt] = pair_integers(integers[vr, 2 * vt], integers[vr, 2 * vt + 1])

    return stage


def integer_weights(tiling: Tiling) -> Callable[..., None]:
    """The sblock integer_weights: weights of values [slots, rows, tokens] as words of two tokens, and their units."""
    rows, tokens = tiling.row_tile, tiling.padded_kv_tile
    convert = to_integers("weight", "pairs", rows, tokens, tiling.token_group)

    @inline
    def stage(weights, words, tile_sum, slot, num_groups, units):
        with T.sblock("integer_weights"):
            T.reads(weights[slot, 0:rows, 0:tokens])
            T.writes(words[slot, 0:rows, 0 : tokens // 2], units[slot, 0:rows])
            convert(lambda r, t: weights[slot, r, t], words, units, slot, num_groups)

    return stage
