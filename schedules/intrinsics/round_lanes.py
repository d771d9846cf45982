"""A tensor intrinsic: a vector of float32 numbers as words of two neighbours, rounded to bfloat16."""

from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.kernels.elements import pair_rounded
from pa_compiler.schedules.intrinsics import registered

_WORDS = 16


def round_lanes(words: int) -> str:
    """Register the intrinsic that makes so many words at once, a multiple of 16, and return its name."""
    return registered(f"pa_compiler.round_lanes_{words}", lambda: _round_lanes(words))


def _round_lanes(words: int) -> tuple[PrimFunc, PrimFunc]:
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
                    pairs[vi] = pair_rounded(numbers[2 * vi], numbers[2 * vi + 1])

    def store(pairs: Buffer, numbers: Buffer) -> None:
        upper = list(range(1, 4 * _WORDS, 2))
        for first in range(0, words, _WORDS):
            halves = []
            for at in (2 * first, 2 * first + _WORDS):
                bits = T.reinterpret(f"int32x{_WORDS}", numbers[T.ramp(at, 1, _WORDS)])
                halves.append(T.reinterpret(f"int16x{2 * _WORDS}", bits + T.broadcast(1 << 15, _WORDS)))
            T.buffer_store(pairs, T.reinterpret(f"int32x{_WORDS}", Shuffle(halves, upper)), [T.ramp(first, 1, _WORDS)])

    @script.prim_func(s_tir=True)
    def implementation(pairs_handle: T.handle, numbers_handle: T.handle) -> None:
        numbers = T.match_buffer(numbers_handle, (2 * words,), "float32", offset_factor=1)
        pairs = T.match_buffer(pairs_handle, (words,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(numbers[0 : 2 * words])
            T.writes(pairs[0:words])
            store(pairs, numbers)

    return description, implementation
