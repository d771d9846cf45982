"""Operands that are one number for all lanes, where an instruction takes that number from a lane of a register.

NEON multiplies a vector by an element of another one. So numbers that lie side by side are read as vectors, where a
broadcast of each would take a load, and of words an instruction of the units that multiply. In a small buffer of its
own a vector stays in its register, and LLVM finds the lane.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import For, IntImm

from pa_compiler.tiles import LANES


def read_vectors(sch: Schedule, scores: SBlockRV, step: LoopRV, lanes: int, copied: bool) -> None:
    """Read elements of keys, the second operand of scores, in vectors.

    Args:
        sch: The schedule.
        scores: Whose axes are token, tile of heads, row and element.
        step: The loop over elements that lie side by side, from which on all loops are unrolled.
        lanes: Elements of a vector, at most.
        copied: Whether keys are read from a copy, which is of one tile of heads.
    """

    def place(t: Expr, i: Expr, r: Expr, d: Expr) -> tuple[Expr, ...]:
        return (*([] if copied else [i]), t, d // lanes, d % lanes)

    vector, step = sch.split(step, [None, min(lanes, int(sch.get(step).extent))])
    depth = [sch.get(each).loop_var for each in sch.get_loops(scores)].index(sch.get(vector).loop_var) + 1
    for each in (vector, step):
        sch.unroll(each)
    read = sch.reindex_cache_read(scores, 1, "global", place)
    sch.compute_at(read, vector, preserve_unit_loops=True)
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
