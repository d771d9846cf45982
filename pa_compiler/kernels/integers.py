"""Numbers as integers, by which codes are multiplied: queries, and weights of values. Of 16 bits for int8, 8 for int4.

number = unit * integer, with one unit for each row, and wrong by up to half of it. Of 16 bits it is a power of two, by
which the largest magnitude of a row is from 2**14 on and below 2**15: numbers of as many digits lose nothing. Of 8 bits
it is a 127th of the largest magnitude. Of a row that holds an infinity or a NaN it is NaN, and makes that of whatever
it multiplies. Sums of products are exact in int32: those of head_dim elements, and those of the tokens of a tile
(cpu/tiles/basis.py has the room).

What weights of 8 bits lose is added up, and comes back as if all codes were MIDDLE_CODE: so a code counts for what is
wrong with its weight by its distance from there, up to 7.5, and not by itself. Of queries the same comes of their sums,
which zero points multiply: those are of the integers (zero_points.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.elements import INFINITE, LARGEST_CODE, MAGNITUDE, four_integers, pair_integers
from pa_compiler.kernels.kept import allocate
from pa_compiler.tiles import Element, Tiling
from pa_compiler.tvmscript import inline

QUERY_GROUP = 16
"""Elements of a query that are taken at a time: head_dim is a multiple of it."""

_PLACES = 14
"""The largest magnitude is 2**_PLACES units or more."""
_BIAS = 127
_MANTISSA = 23
_NEARLY_TWO = 1 << (_MANTISSA - _PLACES - 1)
"""Added to bits: so that what would be rounded to 2**15 units has the next exponent."""
_LEAST = _PLACES + 1
"""The least exponent, as float32 stores it, of which the unit and what divides by it are normal numbers."""
_ROUND = 12582912.0
"""1.5 * 2**23: adding it leaves the nearest integer in the low bits of the significand, of either sign."""


MIDDLE_CODE = LARGEST_CODE / 2
"""Of codes of 4 bits."""

_LARGEST_BYTE = 127
_LEAST_BYTE = 2.0**-119
"""The least magnitude that a 127th is taken of, so that what divides by it is a number."""


def unit_of_bytes(bits: Expr) -> Expr:
    """The unit of integers of 8 bits, of numbers whose largest magnitude has these bits."""
    unit = T.max(T.reinterpret("float32", bits), T.float32(_LEAST_BYTE)) * T.float32(1 / _LARGEST_BYTE)
    return T.Select(bits < INFINITE, unit, T.float32("nan"))


def byte_of(number: Expr, unit: Expr) -> Expr:
    """An int32 whose lowest byte is the integer of a number."""
    return T.reinterpret("int32", number * (T.float32(1) / unit) + T.float32(_ROUND))


def unit_of(bits: Expr) -> Expr:
    """The unit of integers of 16 bits, of numbers whose largest magnitude has these bits."""
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


def to_integers(
    element: Element,
    of: str,
    name: str,
    rows: int,
    columns: int,
    group: int,
    columns_of: Callable[[Expr], tuple[Expr, ...]],
) -> Callable[..., None]:
    """words[slot, r, i] of the integers of numbers(r, column), in the columns that columns_of(i) says; units[slot, r].

    In the caller's sblock, for num_groups groups of columns. numbers(r, column) is an expression, and name that of the
    sblock of the words. lost[slot, r]: the sum of what all integers of a row lose, where that is asked for.
    """
    terms, in_bytes = element.terms, element.integers == 8
    unit, integer, join = (unit_of_bytes, byte_of, four_integers) if in_bytes else (unit_of, integer_of, pair_integers)
    add_up = _sum_lost(of, rows, columns, group)

    @inline
    def stage(
        numbers: Callable[[Expr, Expr], Expr],
        words: Buffer,
        units: Buffer,
        slot: Any,
        num_groups: Any,
        lost: Any = None,
    ):
        largest = T.sblock_alloc_buffer((rows,), "int32")
        integers = T.sblock_alloc_buffer((rows, columns), "int32")
        for r, to, ti in T.grid(rows, num_groups, group):
            with T.sblock(f"{of}_largest"):
                vt = T.axis.reduce(columns, to * group + ti)
                vr = T.axis.spatial(rows, r)
                with T.init():
                    largest[vr] = T.min_value("int32")
                largest[vr] = T.max(
                    largest[vr], T.bitwise_and(T.reinterpret("int32", numbers(vr, vt)), T.int32(MAGNITUDE))
                )
        for r in range(rows):
            with T.sblock(f"{of}_unit"):
                vr = T.axis.spatial(rows, r)
                units[slot, vr] = unit(largest[vr])
        for r, to, ti in T.grid(rows, num_groups, group):
            with T.sblock(f"{of}_integers"):
                vt = T.axis.spatial(columns, to * group + ti)
                vr = T.axis.spatial(rows, r)
                integers[vr, vt] = integer(numbers(vr, vt), units[slot, vr])
        for r, to, ti in T.grid(rows, num_groups, group // terms):
            with T.sblock(name):
                vt = T.axis.spatial(columns // terms, to * (group // terms) + ti)
                vr = T.axis.spatial(rows, r)
                words[slot, vr, vt] = join(*[integers[vr, column] for column in columns_of(vt)])
        if lost is not None:
            add_up(numbers, integers, units, lost, slot, num_groups)

    return stage


def _sum_lost(of: str, rows: int, columns: int, group: int) -> Callable[..., None]:
    """lost[slot, r] = the sum over all columns of numbers(r, column) less units[slot, r] times its integer."""

    @inline
    def stage(numbers, integers, units, lost, slot, num_groups):
        parts = T.sblock_alloc_buffer((rows, group), "float32")
        for r, to, i in T.grid(rows, num_groups, group):
            with T.sblock(f"{of}_lost_parts"):
                vr, vi = T.axis.remap("SS", [r, i])
                vo = T.axis.reduce(columns // group, to)
                with T.init():
                    parts[vr, vi] = T.float32(0)
                kept = T.meta_var(T.reinterpret("float32", integers[vr, vo * group + vi]) - T.float32(_ROUND))
                parts[vr, vi] = parts[vr, vi] + (numbers(vr, vo * group + vi) - units[slot, vr] * kept)
        for r, i in T.grid(rows, group):
            with T.sblock(f"{of}_lost"):
                vr, vi = T.axis.remap("SR", [r, i])
                with T.init():
                    lost[slot, vr] = T.float32(0)
                lost[slot, vr] += parts[vr, vi]

    return stage


def integer_weights(tiling: Tiling) -> Callable[..., None]:
    """The sblock integer_weights: weights of values [slots, rows, tokens] as words of two or four tokens.

    With their units, and what they lose, where that comes back.
    """
    rows, tokens, terms = tiling.row_tile, tiling.padded_kv_tile, tiling.values.terms

    def tokens_of(word):
        return tuple(terms * word + i for i in range(terms))

    convert = to_integers(tiling.values, "weight", "pairs", rows, tokens, tiling.token_group, tokens_of)

    @inline
    def stage(weights, words, tile_sum, slot, num_groups, units, lost=None):
        with T.sblock("integer_weights"):
            T.reads(weights[slot, 0:rows, 0:tokens])
            T.writes(
                words[slot, 0:rows, 0 : tokens // terms],
                units[slot, 0:rows],
                *([] if lost is None else [lost[slot, 0:rows]]),
            )
            convert(lambda r, t: weights[slot, r, t], words, units, slot, num_groups, lost)

    return stage
