"""Tensor intrinsics: a vector of float32 numbers as words of two neighbours, in bfloat16; and of integers, or of four.

By shuffles of the numbers in even and in odd lanes; strided loads would be taken apart into single elements.
"""

import functools
from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import four_integers, pair_floats, pair_integers, pair_rounded
from pa_compiler.schedules.intrinsics import registered

_WORDS = 16


def pair_lanes(words: int) -> str:
    """Register the intrinsic that makes so many words at once of numbers that bfloat16 has, and return its name."""

    @script.inline
    def store(pairs: Buffer, numbers: Buffer) -> None:
        evens: T.let = Shuffle([numbers[T.ramp(0, 1, 2 * words)]], list(range(0, 2 * words, 2)))
        odds: T.let = Shuffle([numbers[T.ramp(0, 1, 2 * words)]], list(range(1, 2 * words, 2)))
        low: T.let = T.bitwise_and(
            T.shift_right(T.reinterpret(f"int32x{words}", evens), T.broadcast(16, words)),
            T.broadcast(65535, words),
        )
        pairs[T.ramp(0, 1, words)] = T.bitwise_or(low, T.reinterpret(f"int32x{words}", odds))

    return registered(f"pa_compiler.pair_lanes_{words}", lambda: _in_pairs(words, pair_floats, store))


def round_lanes(words: int) -> str:
    """Register the intrinsic that makes so many words at once, a multiple of 16, of any numbers; return its name."""

    def store(pairs: Buffer, numbers: Buffer) -> None:
        upper = list(range(1, 4 * _WORDS, 2))
        for first in range(0, words, _WORDS):
            halves = []
            for at in (2 * first, 2 * first + _WORDS):
                bits = T.reinterpret(f"int32x{_WORDS}", numbers[T.ramp(at, 1, _WORDS)])
                halves.append(T.reinterpret(f"int16x{2 * _WORDS}", bits + T.broadcast(1 << 15, _WORDS)))
            T.buffer_store(pairs, T.reinterpret(f"int32x{_WORDS}", Shuffle(halves, upper)), [T.ramp(first, 1, _WORDS)])

    return registered(f"pa_compiler.round_lanes_{words}", lambda: _in_pairs(words, pair_rounded, store))


def join_lanes(words: int) -> str:
    """Register the intrinsic that makes so many words at once of the lower halves of int32, and return its name."""

    def store(pairs: Buffer, numbers: Buffer) -> None:
        halves = T.Cast(f"int16x{2 * words}", numbers[T.ramp(0, 1, 2 * words)])
        T.buffer_store(pairs, T.reinterpret(f"int32x{words}", halves), [T.ramp(0, 1, words)])

    return registered(f"pa_compiler.join_lanes_{words}", lambda: _in_pairs(words, pair_integers, store, "int32"))


def join_fours(words: int, columns_of: Callable[[Any], tuple[Any, ...]], order: str) -> str:
    """Register the intrinsic that makes so many words at once of the lowest bytes of int32, and return its name.

    columns_of(i) are the four that word i is of, all of them among the first 4 * words; order is a name of it.
    """
    taken = [column for word in range(words) for column in columns_of(word)]

    def store(fours: Buffer, numbers: Buffer) -> None:
        given = numbers[T.ramp(0, 1, 4 * words)]
        in_order = given if taken == sorted(taken) else Shuffle([given], taken)
        joined = T.reinterpret(f"int32x{words}", T.Cast(f"int8x{4 * words}", in_order))
        T.buffer_store(fours, joined, [T.ramp(0, 1, words)])

    of_words = functools.partial(_in_words, words, four_integers, store, "int32", columns_of)
    return registered(f"pa_compiler.join_fours_{order}_{words}", of_words)


def _in_pairs(
    words: int, pair: Callable[[Expr, Expr], Expr], store: Callable[[Buffer, Buffer], None], dtype: str = "float32"
) -> tuple[PrimFunc, PrimFunc]:
    """pairs[i] = pair(numbers[2i], numbers[2i + 1]), and the same by store(pairs, numbers)."""
    return _in_words(words, pair, store, dtype, lambda i: (2 * i, 2 * i + 1))


def _in_words(
    words: int,
    join: Callable[..., Expr],
    store: Callable[[Buffer, Buffer], None],
    dtype: str,
    columns_of: Callable[[Any], tuple[Any, ...]],
) -> tuple[PrimFunc, PrimFunc]:
    """words[i] = join of the numbers that columns_of(i) says, and the same by store(words, numbers)."""
    count = len(columns_of(0)) * words

    @script.prim_func(s_tir=True)
    def description(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (count,), dtype, offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0:count])
            T.writes(pairs[0:words])
            for i in range(words):
                with T.sblock("word"):
                    vi = T.axis.spatial(words, i)
                    pairs[vi] = join(*[numbers[column] for column in columns_of(vi)])

    @script.prim_func(s_tir=True)
    def implementation(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (count,), dtype, offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0:count])
            T.writes(pairs[0:words])
            store(pairs, numbers)

    return description, implementation
