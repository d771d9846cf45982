"""A tensor intrinsic: the sums across the lanes of L vectors, as one vector of L sums.

By rounds of shuffles and additions that each join two vectors: the first two within 128 bits, where shuffles are cheap,
the others of whole 128-bit quarters. The vectors come from memory: of those of 256 bits the halves are added as they
are loaded, which takes no shuffles, and nothing crosses 128 bits.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Let, PrimFunc, Shuffle, Var

from pa_compiler import tvmscript as script
from pa_compiler.schedules.intrinsics import registered


def sum_lanes(lanes: int, dtype: str = "float32") -> str:
    """Register the intrinsic for vectors of 1, 2, 4, 8 or 16 lanes of float32 or int32, and return its name."""
    return registered(f"pa_compiler.sum_lanes_{lanes}_{dtype}", lambda: _sum_lanes(lanes, dtype))


_QUARTER = 4
_HALVED = 8  # lanes whose halves are added as they are loaded


def rounds_of(lanes: int) -> list[tuple[list[int], list[int]]]:
    """For each round, which lanes of a pair of vectors are added to which."""
    rounds = []
    if lanes >= 2:
        quads = range(0, lanes, 4)
        if lanes == 2:
            return [([0, 2], [1, 3])]
        low = [q + i + side for q in quads for i in (0, 1) for side in (0, lanes)]
        high = [q + i + side for q in quads for i in (2, 3) for side in (0, lanes)]
        rounds.append((low, high))
        low = [q + i + side for q in quads for side in (0, lanes) for i in (0, 1)]
        high = [q + i + side for q in quads for side in (0, lanes) for i in (2, 3)]
        rounds.append((low, high))
        for _ in range((lanes // 4).bit_length() - 1):
            low = [q + i for q in range(0, 2 * lanes, 8) for i in range(4)]
            rounds.append((low, [i + 4 for i in low]))
    return rounds


def _sum_lanes(lanes: int, dtype: str) -> tuple[PrimFunc, PrimFunc]:
    width = _QUARTER if lanes == _HALVED else lanes
    rounds = rounds_of(width)

    @script.prim_func(s_tir=True)
    def description(sums_handle: T.handle, parts_handle: T.handle) -> None:
        parts = T.match_buffer(parts_handle, (lanes, lanes), dtype, offset_factor=1)
        sums = T.match_buffer(sums_handle, (lanes,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:lanes], parts[0:lanes, 0:lanes])
            T.writes(sums[0:lanes])
            for i, j in T.grid(lanes, lanes):
                with T.sblock("sum"):
                    vj, vi = T.axis.remap("RS", [j, i])  # in the order that rfactor gives
                    sums[vi] = sums[vi] + parts[vi, vj]

    def total(parts: Buffer, first: int) -> Expr:
        """The sums of `width` vectors from the first on."""
        vectors = [parts[first + i, T.ramp(0, 1, width)] for i in range(width)]
        if width < lanes:
            vectors = [low + parts[first + i, T.ramp(width, 1, width)] for i, low in enumerate(vectors)]
        bound: list[tuple[Var, Expr]] = []
        for low, high in rounds:
            names = [Var(f"sum_{len(bound) + i}", f"{dtype}x{width}") for i in range(len(vectors))]
            bound += zip(names, vectors, strict=True)
            pairs = zip(names[::2], names[1::2], strict=True)
            vectors = [Shuffle([a, b], low) + Shuffle([a, b], high) for a, b in pairs]
        result = vectors[0]
        for name, value in reversed(bound):
            result = Let(name, value, result)
        return result

    def store(sums: Buffer, parts: Buffer) -> None:
        for first in range(0, lanes, width):
            columns = T.ramp(first, 1, width)
            T.buffer_store(sums, sums[columns] + total(parts, first), [columns])

    @script.prim_func(s_tir=True)
    def implementation(sums_handle: T.handle, parts_handle: T.handle) -> None:
        parts = T.match_buffer(parts_handle, (lanes, lanes), dtype, offset_factor=1)
        sums = T.match_buffer(sums_handle, (lanes,), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:lanes], parts[0:lanes, 0:lanes])
            T.writes(sums[0:lanes])
            store(sums, parts)

    return description, implementation
