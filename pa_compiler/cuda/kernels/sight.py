"""Sight on CUDA: which keys each row sees, where the rows of a tile are those of several query tokens.

As pa_compiler/kernels/sight.py has it for CPUs: from a begin up to a limit, and of a tree of guesses what its mask
says. A lane knows it of the rows that it has something of, and of the tile as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer

from pa_compiler.bounds import bounds
from pa_compiler.cuda.kernels.state import Registers
from pa_compiler.kernels.rows import BEYOND, begins_late, first_seen, intervals, limit
from pa_compiler.kernels.sight import Tree
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

FIRST, AFTER, LEAST_LIMIT, LAST_BEGIN, RUNS = range(5)
"""What Sight.reach has of a tile: the first key that a row sees and one past the last; the least limit and the last
begin of its rows; and from RUNS on, of each interval of the bounds, where the first of the rows begins and the last
ends."""


class Sight(NamedTuple):
    """What the rows of a tile see.

    Attributes:
        positions: Of the query tokens of the rows that a lane has, by their registers of row_max, int32.
        limits, begins: From begin up to limit such a row sees keys of the item's range, but for what a tree or a mask
            hides; begins is None where all are 0.
        reach: [RUNS + 2 * intervals], int32.
        tree: The tree_mask; its `first` is beyond every sequence where there is none.
    """

    positions: Buffer
    limits: Buffer
    begins: Buffer | None
    reach: Buffer
    tree: Tree

    def sees(self, register: Expr, position: Expr) -> Expr:
        """Whether a row sees the key at a position, but for what a tree and the spec's mask hide."""
        before = position < self.limits[register]
        return before if self.begins is None else T.And(before, position >= self.begins[register])

    def hides(self, register: Expr, position: Expr) -> Expr:
        """Whether a tree hides the key at a position before the row's limit."""
        nth = self.positions[register] - self.tree.first
        in_tree = T.And(position >= self.tree.first, position < self.limits[register])
        return T.And(in_tree, self.tree.hides(nth, position))


def allocate_sight(spec: PagedAttentionSpec, registers: Registers, tree: Tree) -> Sight:
    """Registers for it, with nothing in them."""
    late = begins_late(spec, many_tokens=True)
    sizes = {"positions": registers.rows, "limits": registers.rows, "begins": registers.rows if late else 0}
    sizes["reach"] = RUNS + 2 * len(bounds(spec, many_tokens=True).intervals)
    made = {
        name: IRBuilder.name(name, T.alloc_buffer((size,), "int32", scope="local")) if size else None
        for name, size in sizes.items()
    }
    return Sight(**made, tree=tree)


def widen(reach: Buffer, at: int, value: Expr, combine: Callable[[Expr, Expr], Expr]) -> None:
    """reach[at] = it and a value combined. For the body of a kernel, as widen_runs."""
    T.buffer_store(reach, combine(reach[at], value), [at])


def widen_runs(spec: PagedAttentionSpec, reach: Buffer, at: int, seen: Expr, query_end: Expr) -> None:
    """Take the intervals of one query token into reach: from `at` on, the first key of each and one past the last.

    Such a pair begins as BEYOND and 0.
    """
    for i, (begin, end) in enumerate(intervals(spec, seen, query_end)):
        widen(reach, at + 2 * i, T.Select(begin < end, begin, T.int32(BEYOND)), T.min)
        widen(reach, at + 2 * i + 1, T.Select(begin < end, end, T.int32(0)), T.max)


def find_sight(spec: PagedAttentionSpec, registers: Registers) -> Callable[..., None]:
    """Fill the registers of sight for the rows of a tile, in the range of keys up to range_end.

    first_pos is the position of the sequence's first query token. A token sees what comes before it and itself; with
    sees_all, up to the last of the sequence's `length` tokens. Rows that pad the tile are as the last one.
    """
    late = begins_late(spec, many_tokens=True)

    def begin_reach(reach: Buffer) -> None:
        for i in range(int(reach.shape[0])):
            is_least = i in (FIRST, LEAST_LIMIT) or (i >= RUNS and (i - RUNS) % 2 == 0)
            T.buffer_store(reach, T.int32(BEYOND if is_least else 0), [i])

    @inline
    def stage(sight, rows, lane, first_pos, length, sees_all, range_end):
        reach = T.meta_var(sight.reach)
        begin_reach(reach)
        for nth in range(rows.nth_token(rows.num - 1) - rows.nth_token(0) + 1):
            query_end: T.int32 = first_pos + rows.nth_token(0) + nth + 1
            shown: T.int32 = T.Select(sees_all, length, query_end)
            begin: T.int32 = first_seen(spec, shown, query_end)
            end: T.int32 = T.min(limit(spec, shown, query_end), range_end)
            widen(reach, FIRST, begin, T.min)
            widen(reach, AFTER, end, T.max)
            widen(reach, LEAST_LIMIT, end, T.min)
            widen(reach, LAST_BEGIN, begin, T.max)
            widen_runs(spec, reach, RUNS, shown, query_end)
        for i in T.unroll(registers.rows):
            row = T.meta_var(T.min(registers.row_of(i, lane), rows.num - 1))
            position: T.int32 = first_pos + rows.nth_token(row)
            seen: T.int32 = T.Select(sees_all, length, position + 1)
            sight.positions[i] = position
            sight.limits[i] = T.min(limit(spec, seen, position + 1), range_end)
            if late:
                sight.begins[i] = first_seen(spec, seen, position + 1)

    return stage
