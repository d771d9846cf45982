"""A tensor intrinsic: a small block of 32-bit elements turned, by shuffles of vectors of 4 or of 16."""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.script import tirx as T
from tvm.tirx import Buffer, IntImm, PrimFunc, Shuffle

from pa_compiler import tvmscript as script
from pa_compiler.schedules.intrinsics import registered


def turn(sch: Schedule, copy: SBlockRV, rows: int, columns: int, producer: str | None = None) -> None:
    """Tensorize an sblock that copies a buffer into one whose last two axes are exchanged, by rows x columns elements.

    Where these do not divide the extents, or an extent is known at run time only, it goes on element by element.
    An sblock that computes what is copied is moved to such a block, or element.
    """
    row, column = sch.get_loops(copy)[-2:]
    extents = [sch.get(loop).extent for loop in (row, column)]
    if not all(isinstance(n, IntImm) and n.value % step == 0 for n, step in zip(extents, (rows, columns), strict=True)):
        rows = columns = 1
    row_outer, row = sch.split(row, [None, rows])
    column_outer, column = sch.split(column, [None, columns])
    sch.reorder(row_outer, column_outer, row, column)
    if producer:
        sch.compute_at(producer, column_outer, preserve_unit_loops=True)
    if rows * columns > 1:
        sch.tensorize(row, transpose(rows, columns, str(sch.get(copy).writes[0].source.dtype)))


def transpose(rows: int, columns: int, dtype: str, by_turned: bool = False) -> str:
    """Register the intrinsic turned[c, r] = block[r, c] for powers of 2 whose product is at least 8; return its name.

    Rows of fewer than four elements, of either, must lie one after another. Of 16 or 2 by 16, vectors are whole rows.
    Loops, and the axes of the sblock, go through rows of block, or through those of turned.
    """
    name = f"pa_compiler.transpose_{rows}_{columns}_{dtype}{'_by_turned' if by_turned else ''}"
    return registered(name, lambda: _transpose(rows, columns, dtype, by_turned))


def turned_vectors(vectors: list[Expr], rows: int) -> list[Expr]:
    """The elements of a block of `rows` rows, of which vectors have one row after another, column after column.

    To interleave the first half of all elements with the second turns the binary digits of their numbers by one place:
    after as many times as a row's number has digits, it comes last.
    """
    width, count = vectors[0].ty.dtype.lanes, len(vectors)
    low = [lane + width * of for lane in range(width // 2) for of in range(2)]
    high = [lane + width // 2 for lane in low]
    for _ in range(rows.bit_length() - 1):
        pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
        vectors = [T.bind(Shuffle([a, b], chosen)) for a, b in pairs for chosen in (low, high)]
    return vectors


def _transpose(rows: int, columns: int, dtype: str, by_turned: bool) -> tuple[PrimFunc, PrimFunc]:
    width = 16 if columns == 16 and rows in (2, 16) else 4
    count = rows * columns // width

    @script.prim_func(s_tir=True)
    def description(turned_handle: T.handle, block_handle: T.handle) -> None:
        block_row, turned_row = T.int32(), T.int32()
        block = T.match_buffer(block_handle, (rows, columns), dtype, strides=[block_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (columns, rows), dtype, strides=[turned_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(block[0:rows, 0:columns])
            T.writes(turned[0:columns, 0:rows])
            for i, j in T.grid(*((columns, rows) if by_turned else (rows, columns))):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    turned[(vi, vj) if by_turned else (vj, vi)] = block[(vj, vi) if by_turned else (vi, vj)]

    def store(turned: Buffer, block: Buffer) -> None:
        # Each is bound: what is loaded or shuffled within the stores is so anew for each of them, which may alias it.
        vectors = [T.bind(block[width * i // columns, T.ramp(width * i % columns, 1, width)]) for i in range(count)]
        for i, vector in enumerate(turned_vectors(vectors, rows)):
            T.buffer_store(turned, vector, [width * i // rows, T.ramp(width * i % rows, 1, width)])

    @script.prim_func(s_tir=True)
    def implementation(turned_handle: T.handle, block_handle: T.handle) -> None:
        block_row, turned_row = T.int32(), T.int32()
        block = T.match_buffer(block_handle, (rows, columns), dtype, strides=[block_row, 1], offset_factor=1)
        turned = T.match_buffer(turned_handle, (columns, rows), dtype, strides=[turned_row, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(block[0:rows, 0:columns])
            T.writes(turned[0:columns, 0:rows])
            store(turned, block)

    return description, implementation
