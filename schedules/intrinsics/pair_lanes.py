"""A tensor intrinsic: a vector of float32 numbers that bfloat16 has, as words of two neighbours.

By two shuffles, of the numbers in even and in odd lanes; strided loads would be taken apart into single elements.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import pair_floats
from pa_compiler.schedules.intrinsics import registered


def pair_lanes(words: int) -> str:
    """Register the intrinsic that makes so many words at once, and return its name."""
    return registered(f"pa_compiler.pair_lanes_{words}", lambda: _pair_lanes(words))


def _pair_lanes(words: int) -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (2 * words,), "float32", offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0 : 2 * words])
            T.writes(pairs[0:words])
            for i in range(words):
                with T.sblock("pair"):
                    vi = T.axis.spatial(words, i)
                    pairs[vi] = pair_floats(numbers[2 * vi], numbers[2 * vi + 1])

    @script.prim_func(s_tir=True)
    def implementation(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (2 * words,), "float32", offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0 : 2 * words])
            T.writes(pairs[0:words])
            evens: T.let = Shuffle([numbers[T.ramp(0, 1, 2 * words)]], list(range(0, 2 * words, 2)))
            odds: T.let = Shuffle([numbers[T.ramp(0, 1, 2 * words)]], list(range(1, 2 * words, 2)))
            low: T.let = T.bitwise_and(
                T.shift_right(T.reinterpret(f"int32x{words}", evens), T.broadcast(16, words)),
                T.broadcast(65535, words),
            )
            pairs[T.ramp(0, 1, words)] = T.bitwise_or(low, T.reinterpret(f"int32x{words}", odds))

    return description, implementation
