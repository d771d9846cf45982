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

from pa_compiler.kernels.caches import Cache, CacheAccess
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline

KEYS, VALUES = "next_keys", "next_values"
"""The sblocks that say it of each cache."""

_OP = "next_tile"


def announce(name: str) -> Callable[..., None]:
    """An sblock that says: the tile read next is in the columns from `first` on of cache.offsets, in the head there."""

    @inline
    def stage(cache, first, head_offset):
        with T.sblock(name):
            T.reads()
            T.writes()
            T.evaluate(
                T.call_extern(
                    "int32", _OP, cache.memory[0], cache.offsets[0], cache.block, cache.row, cache.head, first,
                    head_offset,
                )
            )  # fmt: skip

    return stage


def fetch(tiling: Tiling, access: CacheAccess) -> Callable[..., None]:
    """The sblock fetch: ask for share `share` of `shares` equal ones of the next next_len tokens, in one head.

    Their places follow those of the kv_tile tokens that are read now. Where a tile of tokens is read once for many
    tiles of rows, each of these asks for a share, outside of all loops of matmuls; no pass has to find a place for it.
    """
    lines = access.num_lines

    @inline
    def stage(cache, head_offset, share, shares, next_len):
        each: T.let = T.ceildiv(next_len, shares)
        for t in range(each):
            with T.sblock("fetch"):
                vt = T.axis.opaque(tiling.kv_tile, t)
                T.reads()
                T.writes()
                token: T.let = T.min(share * each + vt, next_len - 1)
                for line in range(lines):
                    T.evaluate(_prefetch(cache, access.line(cache, tiling.kv_tile, token * lines + line, head_offset)))

    return stage


def _prefetch(cache: Cache, offset: Expr) -> Expr:
    """Ask for the line of a word, to be read soon: into the second-level cache."""
    read, second_level, data = 0, 2, 1
    return T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(cache.memory[offset]), read, second_level, data)


class Announced(NamedTuple):
    """What announce has said: the arguments that it had."""

    cache: Cache
    first: Expr
    head_offset: Expr


def announced(statement: Evaluate) -> Announced:
    """What the statement of announce's sblock says."""
    _, memory, offsets, block, row, head, first, head_offset = statement.value.args
    return Announced(Cache(memory.source, block, row, head, offsets.source), first, head_offset)
