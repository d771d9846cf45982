"""A tensor intrinsic: up to 16 columns of 16 rows turned, by shuffles of whole vectors of rows."""

from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.schedules.intrinsics import registered
from pa_compiler.schedules.intrinsics.transpose import turned_vectors

LANES = 16


def turn_rows(columns: int) -> str:
    """Register the intrinsic turned[c, r] = block[r, c] of float32, for 16 rows r; return its name.

    Rows of the block have 16 elements, which are read whole, though no more than so many columns are turned.
    """
    return registered(f"pa_compiler.turn_rows_{columns}", lambda: _turn_rows(columns))


def _turn_rows(columns: int) -> tuple[PrimFunc, PrimFunc]:
    @script.prim_func(s_tir=True)
    def description(turned_handle: T.handle, block_handle: T.handle) -> None:
        block_row, turned_row = T.int32(), T.int32()
        block = T.match_buffer(block_handle, (LANES, columns), "float32", strides=[block_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (columns, LANES), "float32", strides=[turned_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(block[0:LANES, 0:columns])
            T.writes(turned[0:columns, 0:LANES])
            for i, j in T.grid(LANES, columns):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    turned[vj, vi] = block[vi, vj]

    def store(turned: Buffer, block: Buffer) -> None:
        # each is bound, as in transpose.py
        vectors = turned_vectors([T.bind(block[i, T.ramp(0, 1, LANES)]) for i in range(LANES)], LANES)
        for i, vector in enumerate(vectors[:columns]):
            T.buffer_store(turned, vector, [i, T.ramp(0, 1, LANES)])

    @script.prim_func(s_tir=True)
    def implementation(turned_handle: T.handle, block_handle: T.handle) -> None:
        block_row, turned_row = T.int32(), T.int32()
        block = T.match_buffer(block_handle, (LANES, columns), "float32", strides=[block_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (columns, LANES), "float32", strides=[turned_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(block[0:LANES, 0:columns])
            T.writes(turned[0:columns, 0:LANES])
            store(turned, block)

    return description, implementation
