"""What the strategies have in common whose rows lie side by side in the lanes of a vector register."""

from __future__ import annotations

import math

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV


def rows_last(sch: Schedule, *sblocks: str | SBlockRV) -> None:
    """Lay the buffer that an sblock writes out with its last two axes exchanged, for all who read it."""
    for name in sblocks:
        sch.transform_layout(name, ("write", 0), lambda *axes: (*axes[:-2], axes[-1], axes[-2]))


def four_maxima(sch: Schedule, name: str, beside: LoopRV | None = None) -> None:
    """The maximum as that of four, of which none waits for another: a maximum takes two cycles or more.

    beside: The loop over token groups in whose body it is taken; None: one of its own.
    """
    peak = sch.get_sblock(name)
    token = sch.get_loops(peak)[-1]
    _, part = sch.split(token, [None, math.gcd(int(sch.get(token).extent), 4)])
    parts = sch.rfactor(part, factor_axis=0)
    if beside is not None:
        sch.reverse_compute_at(parts, beside, preserve_unit_loops=True)
        part, _, token, row = sch.get_loops(parts)[-4:]
        sch.reorder(token, part)
    else:
        row, beside, token, part = sch.get_loops(parts)[-4:]
        sch.reorder(beside, token, part, row)
    sch.unroll(part)
    sch.vectorize(row)
    sch.decompose_reduction(parts, beside)
    row, part = sch.get_loops(peak)[-2:]
    sch.reorder(part, row)
    sch.vectorize(row)
    sch.decompose_reduction(peak, part)


def sum_by_token(sch: Schedule) -> None:
    """A sum for each token of a group, beside the exponentials of the next one, and at last the sum of these."""
    total = sch.get_sblock("tile_sum")
    parts = sch.rfactor(sch.get_loops(total)[-2], factor_axis=2)
    rows_last(sch, parts)
    sch.reverse_compute_at(parts, sch.get_loops("probs")[-3], preserve_unit_loops=True)
    group, token, *_, row = sch.get_loops(parts)[-4:]
    sch.unroll(token)
    sch.vectorize(row)
    sch.decompose_reduction(parts, group)
    token, row = sch.get_loops(total)[-2:]
    sch.unroll(token)
    sch.vectorize(row)
    sch.decompose_reduction(total, token)


def vertical(sch: Schedule, sblock: str) -> None:
    """Rows in lanes, where the last two loops are over rows and value_dim."""
    row, dim = sch.get_loops(sblock)[-2:]
    sch.reorder(dim, row)
    sch.vectorize(row)
