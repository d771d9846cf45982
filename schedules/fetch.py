"""Where a schedule has the next tile of tokens fetched: marks on loops, which the CPU's pass cpu/prefetch.py reads.

A tile has whole token groups, and a token of each cache a number of lines. The lines are spread evenly over the loops
that are marked: over the passes that go through a tile, its token groups, and shares of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

PASS, GROUP, SHARE, HERE = "pa.fetch.pass", "pa.fetch.group", "pa.fetch.share", "pa.fetch.here"
"""The annotations of a loop; their value is the sblock that says what is fetched (kernels/ahead.py)."""
AT_ONCE = "pa.fetch.at_once"
"""How many token groups an iteration of the GROUP loop takes, where that is more than one."""
MARKS = (PASS, GROUP, SHARE, HERE, AT_ONCE)


def fetch(
    sch: Schedule,
    what: str,
    group: LoopRV,
    passes: Sequence[LoopRV] = (),
    shares: Sequence[LoopRV] = (),
    at_once: int = 1,
) -> None:
    """Have a tile's lines fetched over the iterations of some loops, at the beginning of the innermost one's body.

        for pass in passes:             for pass in passes:
            for group in num_groups:        for group in num_groups:
                for share in shares:  ->        for share in shares:
                    body                            prefetch some of the lines
                                                    body

    Args:
        sch: The schedule; the loops stay as they are from here on.
        what: kernels.ahead.KEYS or VALUES.
        group: The loop over token groups.
        passes: Loops around it, each iteration of which goes through all token groups.
        shares: Loops within it.
        at_once: Token groups that an iteration of group takes.
    """
    for mark, loops in ((PASS, passes), (GROUP, [group]), (SHARE, shares)):
        for loop in loops:
            sch.annotate(loop, mark, what)
    sch.annotate([group, *shares][-1], HERE, what)
    if at_once > 1:
        sch.annotate(group, AT_ONCE, at_once)
