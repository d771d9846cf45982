"""Nests of loops that become instructions of AMX: sums of products of pairs whose operands may lie anywhere in memory.

tile_products.py has intrinsics of TensorIR, whose operands are regions of buffers. Here an operand may be words of a
paged cache too, whose place is looked up: what is asked of the nest is that its body adds a dot product of two words to
a sum, as kernels/elements.py has it, and that the words lie in rows of tiles.

A nest has one or two loops over tiles of sums, of 16 columns or of 16 rows, and in them loops over rows, over the
columns and, of products, over pairs. Of the sums of a nest tile i lies in register i from an instruction that clears it
to one that stores it: their buffer is never read or written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tvm_ffi
from tvm.ir import Call, Expr, Range
from tvm.s_tir import MatchBufferRegion, SBlock, Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV, StmtSRef
from tvm.script import tirx as T
from tvm.sym import Analyzer
from tvm.tirx import (
    Add,
    Buffer,
    BufferLoad,
    BufferRegion,
    BufferStore,
    Cast,
    Evaluate,
    For,
    IfThenElse,
    LShift,
    Mul,
    SeqStmt,
    Stmt,
    Var,
    decl_buffer,
)
from tvm.tirx.analysis import undefined_vars

from pa_compiler.kernels.elements import dot_pairs
from pa_compiler.statements import changed

COLUMNS = 16
"""Columns of a tile of sums."""


class Registers(NamedTuple):
    """The tile registers of the operands of a product. Of left ones that are held side by side, that of the first."""

    left: int
    right: int


def clear(sch: Schedule, tiles: LoopRV) -> None:
    """A nest that sets sums to 0: that clears their registers."""
    sblock = sch.blockize(tiles)
    nest = _nest(sch, sblock)
    count = math.prod(int(loop.extent) for loop in nest.loops[:-2])
    statements = [_instruction("tilezero", T.int8(i)) for i in range(count)]
    _become(sch, sblock, statements, [], nest.body.buffer)


def multiply(sch: Schedule, tiles: LoopRV, registers: Registers, row_tiles: int = 1) -> None:
    """A nest that adds to sums: the left operand has its rows, the right one its columns.

    The loops over tiles are one over those of columns, one over row_tiles tiles of rows, or both, rows within columns:
    then the left operands stay in registers side by side. An operand is loaded once for all tiles that share it.

    Raises:
        ValueError: the nest is of another form.
    """
    *more, row, _, _ = _inner(sch, tiles)
    count = math.prod(int(sch.get(loop).extent) for loop in (tiles, *more))
    for loop in (tiles, *more):
        sch.unroll(loop)
    sblock = sch.blockize(row)
    nest = _nest(sch, sblock)
    row, column, pair = nest.loops
    match nest.body:
        case BufferStore(value=Add(b=Add(a=Mul(a=Call(args=[LShift(a=a)]), b=Call(args=[LShift(a=b)]))) as product)):
            pass
        case _:
            raise ValueError(f"nest: expected a sum of dot products of pairs, got {nest.body}")
    if not tvm_ffi.structural_equal(product, dot_pairs(a, b)):
        raise ValueError(f"nest: expected a dot product of pairs, got {product}")
    left, right = (a, b) if nest.goes_by(b, column) else (b, a)
    rows, columns = _rows(nest, left, row, pair), _rows(nest, right, pair, column)
    column_tiles = count // row_tiles
    of_rows, of_columns = (
        T.floormod(T.floordiv(nest.at(index), COLUMNS), tiles) if tiles > 1 else T.int32(0)
        for index, tiles in zip(nest.body.indices[-2:], (row_tiles, column_tiles), strict=True)
    )
    of_left, of_right = T.int8(registers.left), T.int8(registers.right)
    if row_tiles > 1 and column_tiles > 1:
        of_left = T.Cast("int8", registers.left + of_rows)
    load_left = _instruction("tileloadd64", of_left, *rows.at(0))
    load_right = _instruction("tileloadd64", of_right, *columns.at(0))
    statements = [
        IfThenElse(of_columns == 0, load_left, None) if column_tiles > 1 else load_left,
        IfThenElse(of_rows == 0, load_right, None) if row_tiles > 1 else load_right,
        _instruction("tdpbf16ps", T.Cast("int8", of_columns * row_tiles + of_rows), of_left, of_right),
    ]
    _become(sch, sblock, statements, [*rows.matched, *columns.matched], nest.body.buffer)


def _inner(sch: Schedule, loop: LoopRV) -> list[LoopRV]:
    """The loops within a loop around one sblock."""
    (sblock,) = sch.get_child_blocks(loop)
    loops = sch.get_loops(sblock)
    return loops[[sch.get(each).same_as(sch.get(loop)) for each in loops].index(True) + 1 :]


def store(sch: Schedule, tiles: LoopRV) -> None:
    """A nest that copies sums: that stores their registers."""
    sums, sblock = _copy(sch, tiles, "tilestored64", lambda body: (body.value, BufferLoad(body.buffer, body.indices)))
    place = _allocating(sch, sblock, sums)[-1]
    _replace(sch, place, alloc_buffers=[each for each in place.stmt.alloc_buffers if not each.same_as(sums)])


def load(sch: Schedule, tiles: LoopRV) -> None:
    """A nest that copies what was stored to sums: that loads their registers."""
    _copy(sch, tiles, "tileloadd64", lambda body: (BufferLoad(body.buffer, body.indices), body.value))


def _copy(
    sch: Schedule, tiles: LoopRV, instruction: str, sides: Callable[[BufferStore], tuple[BufferLoad, BufferLoad]]
) -> tuple[Buffer, SBlockRV]:
    """A nest between sums and memory, which are the sides of its body: the buffer of the sums, and its sblock."""
    sblock = sch.blockize(tiles)
    nest = _nest(sch, sblock)
    *loops, row, column = nest.loops
    sums, memory = sides(nest.body)
    rows = _rows(nest, memory, row, column, loops)
    statements = [_instruction(instruction, T.int8(i), *rows.at(i)) for i in range(len(rows.first))]
    _become(sch, sblock, statements, rows.matched, sums.source)
    return sums.source, sblock


class _Nest(NamedTuple):
    """A nest of loops: what is in it, by the variables of its sblock, and what these are by those of the loops."""

    loops: list[For]
    body: BufferStore
    values: dict[Var, Expr]

    def goes_by(self, expression: Expr, loop: For) -> bool:
        """Whether an expression depends on a loop."""
        return any(
            variable.same_as(loop.loop_var)
            or any(variable.same_as(own) and self.goes_by(value, loop) for own, value in self.values.items())
            for variable in undefined_vars(expression)
        )

    def at(self, expression: Expr, tile: tuple[int, ...] = ()) -> Expr:
        """An expression at the first row, column and pair of a tile, by its numbers in the outermost loops."""
        analyzer = Analyzer()
        for i, loop in enumerate(self.loops):
            analyzer.bind(loop.loop_var, T.int32(tile[i] if i < len(tile) else 0))
        for variable, value in self.values.items():
            analyzer.bind(variable, value)
        return analyzer.simplify(expression)

    def step(self, index: Expr, loop: For) -> Expr:
        """How much greater an index is in the next iteration of a loop; it is linear in the loop's variable."""
        if not self.goes_by(index, loop):
            return T.int64(0)
        match index:
            case Var():
                own = [value for variable, value in self.values.items() if variable.same_as(index)]
                return self.step(own[0], loop) if own else T.int64(1)
            case Cast(value=value):
                return self.step(value, loop)
            case Add(a=a, b=b):
                return self.step(a, loop) + self.step(b, loop)
            case Mul(a=a, b=b):
                a, b = (a, b) if self.goes_by(a, loop) else (b, a)
                return self.step(a, loop) * T.Cast("int64", b)
        raise ValueError(f"index: expected one that is linear in {loop.loop_var}, got {index}")


class _Rows(NamedTuple):
    """Where the tiles of an operand lie: the first word of each, and how many words further each of its rows is."""

    first: list[BufferLoad]
    row: Expr
    matched: list[MatchBufferRegion]

    def at(self, number: int) -> tuple[Expr, Expr]:
        """The address of one of its tiles, and the bytes of a row."""
        return T.address_of(self.first[number]), T.Cast("int64", self.row) * T.int64(4)


def _rows(nest: _Nest, load: BufferLoad, row: For, column: For, tiles: Sequence[For] = ()) -> _Rows:
    """An operand of which load is an element. A buffer of several axes is matched: its strides are not known yet."""
    numbers = [*itertools.product(*(range(int(loop.extent)) for loop in tiles))]
    if len(load.source.shape) == 1:
        (index,) = load.indices
        return _Rows([BufferLoad(load.source, [nest.at(index, i)]) for i in numbers], nest.step(index, row), [])
    *mins, of_row, _ = (nest.at(index) for index in load.indices)
    columns, stride = load.source.shape[-1], Var("row", "int32")
    down = [Analyzer().simplify(nest.at(load.indices[-2], i) - of_row) for i in numbers]
    region = [*(Range.from_min_extent(first, 1) for first in mins)]
    region.append(Range.from_min_extent(of_row, row.extent + max(map(int, down))))
    region.append(Range.from_min_extent(T.int32(0), columns))
    rows = decl_buffer(
        (region[-2].extent, columns), load.source.dtype, strides=[stride, 1], elem_offset=Var("first", "int32"),
        offset_factor=1,
    )  # fmt: skip
    matched = [MatchBufferRegion(rows, BufferRegion(load.source, region))]
    first = [BufferLoad(rows, [by, nest.at(load.indices[-1], i)]) for by, i in zip(down, numbers, strict=True)]
    return _Rows(first, stride, matched)


def _nest(sch: Schedule, sblock: SBlockRV) -> _Nest:
    """The nest that an sblock is."""
    loops: list[For] = []
    statement = sch.get(sblock).body
    while isinstance(statement, For):
        loops.append(statement)
        statement = statement.body
    inner = statement.block
    values = {axis.var: value for axis, value in zip(inner.iter_vars, statement.iter_values, strict=True)}
    return _Nest(loops, inner.body, values)


def _instruction(name: str, *arguments: Expr) -> Stmt:
    return Evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


def _become(
    sch: Schedule, sblock: SBlockRV, statements: list[Stmt], matched: list[MatchBufferRegion], sums: Buffer
) -> None:
    """Give an sblock another body, in which the buffer of the sums does not occur."""
    body = SeqStmt(statements) if len(statements) > 1 else statements[0]
    place = sch.get_sref(sblock)
    _replace(sch, place, body=body, match_buffers=[*place.stmt.match_buffers, *matched])
    for place in _allocating(sch, sblock, sums)[:-1]:
        reads, writes = (
            [each for each in of if not each.source.same_as(sums)] for of in (place.stmt.reads, place.stmt.writes)
        )
        _replace(sch, place, reads=reads, writes=writes)


def _allocating(sch: Schedule, sblock: SBlockRV, buffer: Buffer) -> list[StmtSRef]:
    """An sblock and those around it, up to the one that allocates a buffer."""
    places, place = [], sch.get_sref(sblock)
    while not any(each.same_as(buffer) for each in getattr(place.stmt, "alloc_buffers", ())):
        places += [place] if isinstance(place.stmt, SBlock) else []
        place = place.parent
    return [*places, place]


def _replace(sch: Schedule, place: StmtSRef, **fields: Any) -> None:
    """Give the sblock at a place other fields."""
    old = place.stmt
    new = changed(old, **fields)
    sch.state.replace(place, new, {old: new})
