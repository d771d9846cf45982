"""Terms in memory, and the sblocks that write them.

They are built in Python, not TVMScript, since how many there are and of which types depends on the functions of a spec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.kernels.caches import whole
from pa_compiler.score import Term


class Value(NamedTuple):
    """An expression, and what it reads, for T.reads: TVM would not see through variables that are bound in it."""

    expression: Expr
    reads: Sequence[Expr | BufferRegion]


class Kept(NamedTuple):
    """Terms that are in memory: of rows [rows], of columns [tokens], of scores [rows, tokens]."""

    terms: Sequence[Term]
    buffers: Sequence[Buffer]

    def __call__(self, *place: Expr) -> dict[Term, Expr]:
        """Where their values in a place are."""
        return {term: of[place] for term, of in zip(self.terms, self.buffers, strict=True)}


def fill(
    name: str,
    target: Buffer,
    value: Callable[..., Value],
    num_groups: Expr | None = None,
    group: int = 0,
    rows: int | None = None,
    slot: Expr | None = None,
) -> None:
    """An sblock: target[slot, row, column] = value(row, column) for all rows and num_groups groups, as there are."""
    extents = [*([] if rows is None else [rows]), *([] if num_groups is None else [num_groups, group])]
    with T.grid(*extents) as loops, T.sblock(name):
        loops = list(loops) if len(extents) > 1 else [loops]
        axes = [] if rows is None else [T.axis.spatial(rows, loops[0])]
        if num_groups is not None:
            axes.append(T.axis.spatial(target.shape[-1], loops[-2] * group + loops[-1]))
        place, stored = axes if slot is None else [slot, *axes], value(*axes)
        T.reads(*stored.reads)
        T.writes(target[tuple(place)])
        T.buffer_store(target, stored.expression, place)


@contextmanager
def stage_block(name: str, regions: Sequence[BufferRegion], written: Sequence[Buffer]) -> Iterator[None]:
    """The sblock of a stage, which reads regions and writes buffers."""
    with T.sblock(name):
        T.reads(*regions)
        T.writes(*map(whole, written))
        yield


def allocate(name: str, shape: Sequence[int], dtype: str) -> Buffer:
    """A buffer of the sblock that is being built."""
    buffer = T.sblock_alloc_buffer(shape, dtype)
    IRBuilder.name(name, buffer)
    return buffer


def kept_dtype(term: Term) -> str:
    """The type of a term in memory."""
    return "float32" if term.dtype == "float32" else "int32"


def written(term: Term, value: Value) -> Value:
    """A value as it is kept: bool as a word of ones or zeros."""
    if term.dtype != "bool":
        return value
    return value._replace(expression=T.Select(value.expression, T.int32(-1), T.int32(0)))
