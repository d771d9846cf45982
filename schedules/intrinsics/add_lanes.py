"""A tensor intrinsic: the lanes of 16 rows added up one after another, for all rows together."""

from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.schedules.intrinsics import registered
from pa_compiler.schedules.intrinsics.transpose import turned_vectors

ROWS = 16


def add_lanes(lanes: int) -> str:
    """Register the intrinsic sums[r] = sums[r] + parts[r, 0] + parts[r, 1] + ... for 16 rows; return its name.

    lanes is a power of 2; rows of parts lie one after another.
    """
    return registered(f"pa_compiler.add_lanes_{lanes}", lambda: _add_lanes(lanes))


def _add_lanes(lanes: int) -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(sums_handle: T.handle, parts_handle: T.handle) -> None:
        parts = T.match_buffer(parts_handle, (ROWS, lanes), "float32", offset_factor=1)
        sums = T.match_buffer(sums_handle, (ROWS,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:ROWS], parts[0:ROWS, 0:lanes])
            T.writes(sums[0:ROWS])
            for r, i in T.grid(ROWS, lanes):
                with T.sblock("sum"):
                    vi, vr = T.axis.remap("RS", [i, r])  # in the order that rfactor gives
                    sums[vr] = sums[vr] + parts[vr, vi]

    def store(sums: Buffer, parts: Buffer) -> None:
        starts = [divmod(ROWS * i, lanes) for i in range(lanes)]
        vectors = [T.bind(parts[row, T.ramp(lane, 1, ROWS)]) for row, lane in starts]
        total = sums[T.ramp(0, 1, ROWS)]
        for vector in turned_vectors(vectors, ROWS):
            total = total + vector
        T.buffer_store(sums, total, [T.ramp(0, 1, ROWS)])

    @script.prim_func(s_tir=True)
    def implementation(sums_handle: T.handle, parts_handle: T.handle) -> None:
        parts = T.match_buffer(parts_handle, (ROWS, lanes), "float32", offset_factor=1)
        sums = T.match_buffer(sums_handle, (ROWS,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:ROWS], parts[0:ROWS, 0:lanes])
            T.writes(sums[0:ROWS])
            store(sums, parts)

    return description, implementation
