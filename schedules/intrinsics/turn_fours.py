"""A tensor intrinsic: rows of four tokens turned, so that a word has a code of each, by shuffles within 16 bytes."""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import FOUR_CODES
from pa_compiler.kernels.fours import TOKENS, turned_codes
from pa_compiler.schedules.intrinsics import registered

_QUARTER = 16
"""Bytes that a shuffle stays within."""


def turn_fours(lanes: int) -> str:
    """Register the intrinsic of rows of so many words, a multiple of 4, and return its name.

    turned[(2 * j + odd) * lanes + lane] = turned_codes of the words lane // 4 * 4 + j of four rows.
    """
    return registered(f"pa_compiler.turn_fours_{lanes}", lambda: _turn_fours(lanes))


def _joined(first: Expr, second: Expr, high: int, unit: int, lanes: int) -> Expr:
    """Units of bytes of two vectors by turns: of each quarter's lower half, or its higher one."""
    taken: list[int] = []
    for quarter in range(0, 4 * lanes, _QUARTER):
        for at in range(quarter + high * _QUARTER // 2, quarter + (high + 1) * _QUARTER // 2, unit):
            taken += [*range(at, at + unit), *range(4 * lanes + at, 4 * lanes + at + unit)]
    return Shuffle([first, second], taken)


def _turn_fours(lanes: int) -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(turned_handle: T.handle, rows_handle: T.handle) -> None:
        rows_row = T.int32()
        rows = T.match_buffer(rows_handle, (TOKENS, lanes), "int32", strides=[rows_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (8 * lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(rows[0:TOKENS, 0:lanes])
            T.writes(turned[0 : 8 * lanes])
            for j, odd, lane in T.grid(4, 2, lanes):
                with T.sblock("turned"):
                    vj, vodd, vlane = T.axis.remap("SSS", [j, odd, lane])
                    word = T.meta_var(T.floordiv(vlane, 4) * 4 + vj)
                    turned[(vj * 2 + vodd) * lanes + vlane] = turned_codes(
                        [rows[k, word] for k in range(TOKENS)], vlane, vodd
                    )

    def store(turned: Buffer, rows: Buffer) -> None:
        codes, words = f"int8x{4 * lanes}", f"int32x{lanes}"
        given = [T.bind(T.reinterpret(codes, rows[k, T.ramp(0, 1, lanes)])) for k in range(TOKENS)]
        for half in range(2):
            pairs = [T.bind(_joined(given[k], given[k + 1], half, 1, lanes)) for k in (0, 2)]
            for quarter in range(2):
                word = T.bind(T.reinterpret(words, _joined(pairs[0], pairs[1], quarter, 2, lanes)))
                for odd in range(2):
                    shifted = T.shift_right(word, T.broadcast(4, lanes)) if odd else word
                    at = ((2 * half + quarter) * 2 + odd) * lanes
                    T.buffer_store(
                        turned, T.bitwise_and(shifted, T.broadcast(FOUR_CODES, lanes)), [T.ramp(at, 1, lanes)]
                    )

    @script.prim_func(s_tir=True)
    def implementation(turned_handle: T.handle, rows_handle: T.handle) -> None:
        rows_row = T.int32()
        rows = T.match_buffer(rows_handle, (TOKENS, lanes), "int32", strides=[rows_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (8 * lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(rows[0:TOKENS, 0:lanes])
            T.writes(turned[0 : 8 * lanes])
            store(turned, rows)

    return description, implementation
