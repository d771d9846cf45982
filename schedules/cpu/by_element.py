"""Operands that are one number for all lanes, where an instruction takes that number from a lane of a register.

NEON multiplies a vector by an element of another one. So numbers that lie side by side are read as vectors, where a
broadcast of each would take a load, and of words an instruction of the units that multiply. In a small buffer of its
own a vector stays in its register, and LLVM finds the lane.
"""

from __future__ import annotations

from tvm.ir import Expr, Range
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import BufferRegion, For, IntImm

from pa_compiler.statements import changed
from pa_compiler.tiles import LANES

WORDS = 4
"""Words of a vector."""


def read_vectors(
    sch: Schedule, sums: SBlockRV, step: LoopRV, lanes: int, copied: bool, half: LoopRV | None = None
) -> None:
    """Read elements of keys or values, the second operand of sums, in vectors.

    Args:
        sch: The schedule.
        sums: Whose axes are token, or pair of tokens, tile of heads, row and element.
        step: The loop over elements that lie side by side, from which on all loops are unrolled.
        lanes: Elements of a vector, at most.
        copied: Whether they are read from a copy, which is of one tile of heads.
        half: The loop over vectors that elements of a copy lie in by turns, around all of these; None: there are none.
    """

    def place(t: Expr, i: Expr, r: Expr, d: Expr) -> tuple[Expr, ...]:
        return (*([] if copied else [i]), t, d // lanes, d % lanes)

    vector, step = sch.split(step, [None, min(lanes, int(sch.get(step).extent))])
    for each in (vector, step):
        sch.unroll(each)
    if half is None:
        if copied:
            _reads_element(sch, sums)
        read = sch.reindex_cache_read(sums, 1, "global", place)
    else:
        read = sch.cache_read(sums, 1, "global", [sums])
    *_, outer, lane = _in_vectors(sch, read, sums, vector)
    _as_it_is(sch, outer, lane, half)


def read_words(sch: Schedule, sums: SBlockRV, around: LoopRV) -> None:
    """Read words of rows, the first operand of sums, in vectors: those of the loop below `around`, which is unrolled.

    Where there are fewer than a vector has, each is left to a load of its own.
    """
    if int(sch.get(_below(sch, sums, sums, around)[0]).extent) % WORDS == 0:
        _in_vectors(sch, sch.cache_read(sums, 0, "global", [sums]), sums, around)


def _in_vectors(sch: Schedule, read: SBlockRV, sums: SBlockRV, around: LoopRV) -> list[LoopRV]:
    """Read in vectors below a loop around sums, for their lanes; the loops of it, the last over the lanes."""
    sch.compute_at(read, around, preserve_unit_loops=True)
    loops = _below(sch, read, sums, around)
    for each in loops[:-1]:
        sch.unroll(each)
    sch.vectorize(loops[-1])
    sch.annotate(read, LANES, 1)
    return loops


def _below(sch: Schedule, sblock: SBlockRV, sums: SBlockRV, around: LoopRV) -> list[LoopRV]:
    """The loops of an sblock below a loop around sums, in which it is too."""
    of_sums = [sch.get(each).loop_var for each in sch.get_loops(sums)]
    return sch.get_loops(sblock)[of_sums.index(sch.get(around).loop_var) + 1 :]


def _reads_element(sch: Schedule, sums: SBlockRV) -> None:
    """Say of which element of a copy, [token, element], an sblock reads: kernels say that they read any of it."""
    old = sch.get(sums)
    token, *_, element = (Range.from_min_extent(axis.var, 1) for axis in old.iter_vars)
    reads = [old.reads[0], BufferRegion(old.reads[1].source, [token, element]), *old.reads[2:]]
    new = changed(old, reads=reads)
    sch.state.replace(sch.get_sref(sums), new, {old: new})


def _as_it_is(sch: Schedule, outer: LoopRV, lane: LoopRV, half: LoopRV | None) -> None:
    """Have a vector read without asking whether it is inside of the array: it is wherever it is multiplied.

    TVM cannot know that, since token groups are as many as a call has. Nor does it see that in an iteration of half
    only the vector of this number is read: the loop around lanes is of all up to it.
    """
    old, around = sch.get(lane), sch.get(outer)
    places = list(old.body.iter_values)
    if half is not None:
        places[-2] = sch.get(half).loop_var
    realize = SBlockRealize(places, IntImm("bool", 1), old.body.block)
    vector = For(old.loop_var, old.min, old.extent, old.kind, realize, old.thread_binding, old.annotations)
    extent = around.extent if half is None else 1
    new = For(around.loop_var, around.min, extent, around.kind, vector, around.thread_binding, around.annotations)
    sch.state.replace(sch.get_sref(outer), new, {})
