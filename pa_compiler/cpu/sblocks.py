"""Scheduled functions taken apart and put together again: what the CPU's passes have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm.s_tir import Schedule
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
    from tvm.s_tir import SBlock

    old = place.stmt
    new = SBlock(
        old.iter_vars, old.reads, old.writes, old.name_hint, body, old.init, old.alloc_buffers, old.match_buffers,
        old.annotations,
    )  # fmt: skip
    sch.state.replace(place, new, {old: new})
