"""Sums and maxima of a row whose tokens, or elements, lie in lanes."""

from tvm.s_tir import Schedule


def by_lanes(sch: Schedule, name: str, axis: int, lanes: int = 0) -> None:
    """What is made of a row's tokens first lane by lane: of all those of a token group, or of so many lanes."""
    total = sch.get_sblock(name)
    lane = sch.get_loops(total)[-1]
    if lanes:
        _, lane = sch.split(lane, [None, lanes])
    parts = sch.rfactor(lane, factor_axis=axis)
    *_, row, _ = around = sch.get_loops(total)
    sch.compute_at(parts, row, preserve_unit_loops=True)
    sums = sch.cache_write(parts, 0, "global")
    lane, *groups = sch.get_loops(parts)[len(around) - 1 :][: 3 if lanes else 2]
    sch.reorder(*groups, lane)
    sch.vectorize(lane)
    sch.vectorize(sch.get_loops(sums)[-1])
    sch.decompose_reduction(parts, groups[0])
    lane = sch.get_loops(total)[-1]
    sch.unroll(lane)
    sch.decompose_reduction(total, lane)
