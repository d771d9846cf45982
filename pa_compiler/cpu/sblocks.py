"""Scheduled functions taken apart and put together again: what the CPU's passes have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm.s_tir import SBlock, Schedule
    from tvm.s_tir.schedule import SBlockRV, StmtSRef
    from tvm.tirx import Stmt


def sblocks(sch: Schedule) -> list[SBlockRV]:
    """All sblocks of the function that the schedule works on."""
    found = [sch.get_sblock("root")]
    for sblock in found:
        found += sch.get_child_blocks(sblock)
    return found


def replace_body(sch: Schedule, place: StmtSRef, body: Stmt) -> None:
    """Give the sblock at a place another body."""
    new = with_body(place.stmt, body)
    sch.state.replace(place, new, {place.stmt: new})


def with_body(sblock: SBlock, body: Stmt) -> SBlock:
    """An sblock with another body."""
    from tvm import s_tir

    return s_tir.SBlock(
        sblock.iter_vars, sblock.reads, sblock.writes, sblock.name_hint, body, sblock.init, sblock.alloc_buffers,
        sblock.match_buffers, sblock.annotations,
    )  # fmt: skip
