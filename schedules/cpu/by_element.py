"""Operands that are one number for all lanes, where an instruction takes that number from a lane of a register.

NEON multiplies a vector by an element of another one. So numbers that lie side by side are read as vectors, where a
broadcast of each would take a load, and of words an instruction of the units that multiply. In a small buffer of its
own a vector stays in its register, and LLVM finds the lane.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import For, IntImm

from pa_compiler.tiles import LANES


def read_vectors(
    sch: Schedule, sblock: SBlockRV, operand: int, loop: LoopRV, place: Callable[..., tuple[Expr, ...]]
) -> None:
    """Read an operand of an sblock in vectors at the beginning of a loop's body.

    Args:
        sch: The schedule.
        sblock: Which multiplies the numbers.
        operand: Which of what it reads they are.
        loop: In each iteration of which whole vectors are read.
        place: Of the sblock's axes, an element's place in a buffer whose last axis is of a vector's lanes.
    """
    depth = [sch.get(each).loop_var for each in sch.get_loops(sblock)].index(sch.get(loop).loop_var) + 1
    read = sch.reindex_cache_read(sblock, operand, "global", place)
    sch.compute_at(read, loop, preserve_unit_loops=True)
    *unrolled, lane = sch.get_loops(read)[depth:]
    for each in unrolled:
        sch.unroll(each)
    sch.vectorize(lane)
    sch.annotate(read, LANES, 1)
    _always(sch, lane)


def _always(sch: Schedule, loop: LoopRV) -> None:
    """Have what is in a loop done without asking whether it is inside of the array: it is wherever it is multiplied.

    TVM cannot know that, since token groups are as many as a call has.
    """
    old = sch.get(loop)
    realize = SBlockRealize(old.body.iter_values, IntImm("bool", 1), old.body.block)
    new = For(old.loop_var, old.min, old.extent, old.kind, realize, old.thread_binding, old.annotations)
    sch.state.replace(sch.get_sref(loop), new, {})
