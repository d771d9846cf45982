"""Tensor intrinsics: a vector of float32 numbers as words of two neighbours, in bfloat16; and of integers.

By shuffles of the numbers in even and in odd lanes; strided loads would be taken apart into single elements.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import pair_floats, pair_integers, pair_rounded
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


def _in_pairs(
    words: int, pair: Callable[[Expr, Expr], Expr], store: Callable[[Buffer, Buffer], None], dtype: str = "float32"
) -> tuple[PrimFunc, PrimFunc]:
    """pairs[i] = pair(numbers[2i], numbers[2i + 1]), and the same by store(pairs, numbers)."""

    @script.prim_func(s_tir=True)
    def description(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (2 * words,), dtype, offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0 : 2 * words])
            T.writes(pairs[0:words])
            for i in range(words):
                with T.sblock("pair"):
                    vi = T.axis.spatial(words, i)
                    pairs[vi] = pair(numbers[2 * vi], numbers[2 * vi + 1])

    @script.prim_func(s_tir=True)
    def implementation(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (2 * words,), dtype, offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0 : 2 * words])
            T.writes(pairs[0:words])
            store(pairs, numbers)

    return description, implementation
