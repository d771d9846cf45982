"""A tensor intrinsic: the maxima across the lanes of up to 16 vectors of 16 lanes, of all vectors together.

By rounds of shuffles that each join two vectors, as in sum_lanes.py; one that is left alone is joined with itself.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.schedules.intrinsics import registered
from pa_compiler.schedules.intrinsics.sum_lanes import rounds_of

LANES = 16


def max_lanes(rows: int) -> str:
    """Register the intrinsic maxima[r] = max(maxima[r], parts[r, 0], ...) for up to 16 rows; return its name."""
    return registered(f"pa_compiler.max_lanes_{rows}", lambda: _max_lanes(rows))


def _max_lanes(rows: int) -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(maxima_handle: T.handle, parts_handle: T.handle) -> None:
        parts = T.match_buffer(parts_handle, (rows, LANES), "float32", offset_factor=1)
        maxima = T.match_buffer(maxima_handle, (rows,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(maxima[0:rows], parts[0:rows, 0:LANES])
            T.writes(maxima[0:rows])
            for r, i in T.grid(rows, LANES):
                with T.sblock("maximum"):
                    vi, vr = T.axis.remap("RS", [i, r])  # in the order that rfactor gives
                    maxima[vr] = T.max(maxima[vr], parts[vr, vi])

    def joined(parts: Buffer) -> Expr:
        vectors = [T.bind(parts[r, T.ramp(0, 1, LANES)]) for r in range(rows)]
        vectors += vectors[-1:] * ((1 << (rows - 1).bit_length()) - rows)
        for low, high in rounds_of(LANES):
            pairs = [(vectors[0], vectors[0])] if len(vectors) == 1 else zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [T.bind(T.max(Shuffle([a, b], low), Shuffle([a, b], high))) for a, b in pairs]
        return vectors[0] if rows == LANES else Shuffle([vectors[0]], list(range(rows)))

    def store(maxima: Buffer, parts: Buffer) -> None:
        if rows == 1:
            T.buffer_store(maxima, T.max(maxima[0], joined(parts)), [0])
        else:
            columns = T.ramp(0, 1, rows)
            T.buffer_store(maxima, T.max(maxima[columns], joined(parts)), [columns])

    @script.prim_func(s_tir=True)
    def implementation(maxima_handle: T.handle, parts_handle: T.handle) -> None:
        parts = T.match_buffer(parts_handle, (rows, LANES), "float32", offset_factor=1)
        maxima = T.match_buffer(maxima_handle, (rows,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(maxima[0:rows], parts[0:rows, 0:LANES])
            T.writes(maxima[0:rows])
            store(maxima, parts)

    return description, implementation
