"""Rows: what a head tile attends for. The one place that says which query token and which head a row is."""

from __future__ import annotations

from typing import NamedTuple

from tvm.ir import Expr
from tvm.tirx import Buffer


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


def limit(context_lens: Buffer, seq: Expr) -> Expr:
    """The first key position that the rows of a sequence's query token must not see.

    A query token sees itself and what comes before it. In decode it is the last of its sequence.
    """
    return context_lens[seq]
