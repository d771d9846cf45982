"""Rows of four tokens that become words of four codes, to be multiplied by integers of 8 bits (kernels/fours.py)."""

from tvm.s_tir import Schedule

from pa_compiler.schedules.intrinsics.turn_fours import turn_fours
from pa_compiler.tiles import VectorTiling


def load_values(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of four tokens in registers, turned there; in a sweep in the order of memory."""
    lanes = tiling.values.turned
    head, group, four, chunk, turned, *_ = sch.get_loops("turned")[-7:]
    if tiling.sweep == "tokens":
        sch.reorder(group, four, head)
        four = head
    sch.compute_at("load_rows", four, preserve_unit_loops=True)
    token, word = sch.get_loops("load_rows")[-2:]
    outer, lane = sch.split(word, [None, lanes])
    for loop in (token, outer, chunk):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.tensorize(turned, turn_fours(lanes))
