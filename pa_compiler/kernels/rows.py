"""Rows: what a head tile attends for. The one place that says which query token and which head a row is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.spec import PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import Tiling


class Rows(NamedTuple):
    """The rows of a head tile, which share the keys and values of one kv head.

    In decode a sequence has one query token, its last, and the rows are query heads of it: all of them see the same
    keys (limit).

    Attributes:
        token: The query token, an index into query, out and lse.
        first_head: The query head of the first row.
        num: Rows that there are; the others pad the tile.
    """

    token: Expr
    first_head: Expr
    num: Expr | int

    def at(self, row: Expr, *rest: Expr) -> tuple[Expr, ...]:
        """The query token and the head of a row, and what is given besides: an index into query, out or lse."""
        return self.token, self.first_head + row, *rest

    def all(self, *rest: slice) -> tuple[Expr | slice, ...]:
        """The same of all rows that there are, for what a stage reads and writes."""
        return self.token, slice(self.first_head, self.first_head + self.num), *rest


def rows_of_tiles(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., Rows]:
    """(seq, tile) -> the rows of one of a sequence's head tiles."""
    group, rows, group_tiles = spec.group, tiling.row_tile, tiling.row_tiles(spec)

    def rows_of(seq: Expr, tile: Expr) -> Rows:
        row_start = T.floormod(tile, group_tiles) * rows
        first_head = T.floordiv(tile, group_tiles) * group + row_start
        return Rows(seq, first_head, rows if group % rows == 0 else T.min(group - row_start, rows))

    return rows_of


def limit(context_lens: Buffer, seq: Expr) -> Expr:
    """The first key position that the rows of a sequence's query token must not see.

    A query token sees itself and what comes before it. In decode it is the last of its sequence.
    """
    return context_lens[seq]


def first_seen(spec: PagedAttentionSpec, end: Expr) -> Expr:
    """The first key position that they see, where limit is `end`: of a window the last `window` keys."""
    return T.int32(0) if spec.window is None else T.max(end - spec.window, 0)


def first_read(spec: PagedAttentionSpec, seen: Expr) -> Expr:
    """The position from which on keys are read, to see those from `seen` on.

    Packed keys are read PACKED_TOKENS at a time, from a multiple of it.
    """
    return seen - T.floormod(seen, PACKED_TOKENS) if masks_first_tile(spec) else seen


def masks_first_tile(spec: PagedAttentionSpec) -> bool:
    """Whether tiles may begin before the first key that is seen."""
    return spec.window is not None and spec.kv_layout == "packed"
