"""CPU strategy of append_kv: elements that lie side by side in the cache are moved in vectors, the rest is unrolled.

Nothing is kept in registers. Vectors of more bytes than the target has are split by LLVM, so no size depends on it.
"""

import math

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from pa_compiler.tiles import Tiling

_VECTOR_ELEMENTS = 32
_UNROLLED = 16  # vectors, or elements that lie apart: one address is computed for all of them


def token(sch: Schedule, tiling: Tiling) -> None:
    """One token in one head; tokens are written in their order."""
    run, adjacent = sch.get_loops(sch.get_sblock("element"))[-2:]
    vector, lane = sch.split(adjacent, [None, _factor(sch, adjacent, _VECTOR_ELEMENTS)])
    moves = sch.fuse(run, vector)
    _, unrolled = sch.split(moves, [None, _factor(sch, moves, _UNROLLED)])
    sch.unroll(unrolled)
    sch.vectorize(lane)


def quantised_token(sch: Schedule, tiling: Tiling) -> None:
    """One token in one head: its largest magnitude lane by lane, then its codes in vectors."""
    inside = {sch.get(each).name_hint for each in sch.get_child_blocks(sch.get_sblock("quantised_token"))}
    for name in ("peaks", "bottoms"):
        if name in inside:
            step, lane = sch.get_loops(name)[-2:]
            sch.vectorize(lane)
            sch.vectorize(sch.get_loops(sch.decompose_reduction(name, step))[-1])
    if "row" in inside:
        sch.vectorize(sch.split(sch.get_loops("row")[-1], [None, _factor(sch, sch.get_loops("row")[-1], 32)])[1])
    if "code" not in inside:  # halves of bytes are read, changed and written one by one
        return
    loop = sch.get_loops("code")[-1]
    _, lane = sch.split(loop, [None, _factor(sch, loop, _VECTOR_ELEMENTS)])
    sch.vectorize(lane)


STAGES = {"token": token, "quantised_token": quantised_token}
"""How the PrimFuncs of append_kv are scheduled, by the name of the sblock."""


def _factor(sch: Schedule, loop: LoopRV, limit: int) -> int:
    """The largest power of two up to limit, itself one, that divides a loop's extent."""
    return math.gcd(int(sch.get(loop).extent), limit)
