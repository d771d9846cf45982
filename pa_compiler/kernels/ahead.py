"""What the algorithm reads next: said where it is known, so that a schedule can have it fetched meanwhile.

The statement of announce computes nothing. It is made where tiles have `prefetches`; cpu/prefetch.py takes it out, and
puts instructions into the loops that a schedule has marked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Evaluate

from pa_compiler.kernels.caches import Cache
from pa_compiler.tvmscript import inline

KEYS, VALUES, EARLY_KEYS = "next_keys", "next_values", "early_keys"
"""The sblocks that say it of each cache; of keys too where they are fetched before the matmuls."""

_OP = "next_tile"


def announce(name: str) -> Callable[..., None]:
    """An sblock that says: the tile read next is in the columns from `first` on of cache.offsets, in the head there.

    Attend says more: whether it is wanted at all, and, where tokens are to be fetched with all of their heads, how many
    heads from head_offset on, and which of as many equal shares of the tile's tokens.
    """

    @inline
    def stage(cache, first, head_offset, *more):
        with T.sblock(name):
            T.reads()
            T.writes()
            T.evaluate(
                T.call_extern(
                    "int32", _OP, cache.memory[0], cache.offsets[0], cache.block, cache.row, cache.head, first,
                    head_offset, *more,
                )
            )  # fmt: skip

    return stage


class Announced(NamedTuple):
    """What announce has said: the arguments that it had."""

    cache: Cache
    first: Expr
    head_offset: Expr
    wanted: Expr | None = None
    heads: Expr | None = None
    share: Expr | None = None


def announced(statement: Evaluate) -> Announced:
    """What the statement of announce's sblock says."""
    _, memory, offsets, block, row, head, *said = statement.value.args
    return Announced(Cache(memory.source, block, row, head, offsets.source), *said)
