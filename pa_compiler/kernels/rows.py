"""Rows: what a head tile attends for. The one place that says which query token and which head a row is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.bounds import affine, bounds
from pa_compiler.spec import PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import TILE_TOKENS, Tiling
from pa_compiler.tvmscript import inline


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

    def of_partial(self, slot: Expr) -> Rows:
        """The same rows of a partial result, in a slot."""
        return self._replace(token=slot)


class TokenRows(NamedTuple):
    """The rows of a tile that has several query tokens: pairs of a token and a head, the heads of a token in turn.

    Each query token sees keys of its own (kernels/sight.py).

    Attributes:
        token: The query token of pair 0, an index into query, out and lse.
        num_tokens: Query tokens that there are.
        first_head: The first query head of the kv head.
        group: Query heads of a kv head.
        first_pair: The pair that the first row is.
        num: Rows that there are; the others pad the tile.
    """

    token: Expr
    num_tokens: Expr
    first_head: Expr
    group: int
    first_pair: Expr
    num: Expr

    def nth_token(self, row: Expr) -> Expr:
        """Which of the query tokens a row is, from 0 on; beyond them for rows that pad the tile."""
        return T.floordiv(self.first_pair + row, self.group)

    def at(self, row: Expr, *rest: Expr) -> tuple[Expr, ...]:
        """As Rows.at."""
        head = self.first_head + T.floormod(self.first_pair + row, self.group)
        return self.token + self.nth_token(row), head, *rest

    def all(self, *rest: slice) -> tuple[Expr | slice, ...]:
        """As Rows.all: a region that holds all rows that there are."""
        tokens = slice(self.token, self.token + self.num_tokens)
        return tokens, slice(self.first_head, self.first_head + self.group), *rest

    def of_partial(self, slot: Expr) -> TokenRows:
        """The same rows of partial results, which have a slot for each query token, from `slot` on."""
        return self._replace(token=slot)


AnyRows = Rows | TokenRows

BEYOND = affine.MAX_LENGTH
"""A position that is beyond every sequence."""


class OfRows(NamedTuple):
    """A number for each row, where rows have several query tokens: [tiles, rows], int32, of one tile."""

    numbers: Buffer
    tile: Expr

    def at(self, row: Expr) -> Expr:
        """That of a row."""
        return self.numbers[self.tile, row]


def of_row(number: Any, row: Expr) -> Any:
    """A number of the query token of a row: the same for all rows, or OfRows."""
    return number.at(row) if isinstance(number, OfRows) else number


def rows_of_tiles(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., Rows]:
    """(seq, tile) -> the rows of one of a sequence's head tiles."""
    group, rows, group_tiles = spec.group, tiling.row_tile, tiling.row_tiles(spec)

    def rows_of(seq: Expr, tile: Expr) -> Rows:
        row_start = T.floormod(tile, group_tiles) * rows
        first_head = T.floordiv(tile, group_tiles) * group + row_start
        return Rows(seq, first_head, rows if group % rows == 0 else T.min(group - row_start, rows))

    return rows_of


def limit(spec: PagedAttentionSpec, context_len: Expr, query_end: Expr | None = None) -> Expr:
    """The first key position that the rows of a sequence's query token must not see.

    A query token sees itself and what comes before it, as far as the mask has it. In decode it is the last of its
    sequence, of context_len tokens. Otherwise query_end is one more than its position, and context_len the tokens that
    it may see but for the mask: up to itself, or more of its sequence.
    """
    ends = intervals(spec, context_len, query_end)
    if len(ends) == 1:
        return ends[0][1]
    return functools.reduce(T.max, (T.Select(begin < end, end, T.int32(0)) for begin, end in ends))


def first_seen(spec: PagedAttentionSpec, context_len: Expr, query_end: Expr | None = None) -> Expr:
    """The first key position that they see; one beyond every sequence where they see none."""
    ends, beyond, many_tokens = intervals(spec, context_len, query_end), T.int32(BEYOND), query_end is not None
    if len(ends) == 1 and (not begins_late(spec, many_tokens) or _sees_itself(spec, many_tokens)):
        return ends[0][0]
    return functools.reduce(T.min, (T.Select(begin < end, begin, beyond) for begin, end in ends))


def sees_block(
    spec: PagedAttentionSpec, context_len: Expr, block_idx: Expr, query_end: Expr | None = None
) -> Expr | None:
    """Whether they see any key of a block; None where they see all blocks between the first and the last that they see.

    With intervals of keys that have blocks between them, which are neither looked up nor read.
    """
    return sees_any(spec, context_len, block_idx * spec.block_size, (block_idx + 1) * spec.block_size, query_end)


def sees_any(
    spec: PagedAttentionSpec, context_len: Expr, first: Expr, after: Expr, query_end: Expr | None = None
) -> Expr | None:
    """The same of the keys from position first to after - 1."""
    ends = intervals(spec, context_len, query_end)
    if len(ends) == 1:
        return None
    return functools.reduce(T.Or, (T.max(begin, first) < T.min(end, after) for begin, end in ends))


def intervals(spec: PagedAttentionSpec, context_len: Expr, query_end: Expr | None = None) -> list[tuple[Expr, Expr]]:
    """The intervals of key positions that are seen, from 0 to context_len at most, and empty where end <= begin.

    Ends that are numbers go by context_len too: by a number alone TVM would say how many tokens a block has, block by
    block, and allocate as much.
    """
    operations = affine.Operations(T.floordiv, T.min, T.max)
    ends = []
    for interval in bounds(spec, query_end is not None).intervals:
        begin, end = (affine.value(each, context_len, operations, query_end) for each in interval)
        if isinstance(begin, int):
            begin = T.min(T.int32(begin), context_len) if begin > 0 else T.int32(0)
        else:
            begin = T.max(begin, 0)
        if isinstance(end, int):
            end = T.Select(context_len < end, context_len, T.int32(end))
        elif interval.end != affine.LENGTH:
            end = T.min(context_len, end)
        ends.append((begin, end))
    return ends


def _sees_itself(spec: PagedAttentionSpec, many_tokens: bool) -> bool:
    """Whether the query token sees its own key, whatever the length."""
    begin, end = bounds(spec, many_tokens).intervals[0]
    query_pos = affine.add(affine.QUERY_END if many_tokens else affine.LENGTH, affine.constant(-1))
    return end == affine.LENGTH and affine.at_least(query_pos, begin)


def begins_late(spec: PagedAttentionSpec, many_tokens: bool = False) -> bool:
    """Whether the first key that is seen may be another than the first of the sequence."""
    return all(interval.begin != affine.constant(0) for interval in bounds(spec, many_tokens).intervals)


def first_read(spec: PagedAttentionSpec, seen: Expr, many_tokens: bool = False) -> Expr:
    """The position from which on keys are read, to see those from `seen` on.

    Packed keys are read PACKED_TOKENS at a time, from a multiple of it.
    """
    return seen - T.floormod(seen, PACKED_TOKENS) if masks_first_tile(spec, many_tokens) else seen


def first_of_range(spec: PagedAttentionSpec, tiling: Tiling, block_begin: Expr, seen: Expr) -> Expr:
    """The same for a range of a sequence's blocks, of which those that are not seen are left out.

    In the steps of attend, tiles begin at multiples of kv_tile, of which ranges have whole numbers.
    """
    if tiling.rows_in_place:
        return T.max(block_begin * spec.block_size, seen - T.floormod(seen, TILE_TOKENS))
    if not tiling.weight_sums:
        return T.max(block_begin * spec.block_size, first_read(spec, seen))
    begin = block_begin * spec.block_size
    return T.Select(seen < begin, begin, T.floordiv(seen, tiling.kv_tile) * tiling.kv_tile)


def masks_first_tile(spec: PagedAttentionSpec, many_tokens: bool = False, in_step: bool = False) -> bool:
    """Whether tiles may begin before the first key that is seen: packed, or in_step, Tiling.rows_in_place."""
    return begins_late(spec, many_tokens) and (spec.kv_layout == "packed" or in_step)


def by_rows(tiling: Tiling, made: Callable[[bool], Callable[..., None]]) -> Callable[..., None]:
    """made(few=False), or made(few=True) where a tile has few_rows rows at most: the bits of the rows are the same."""
    few = tiling.few_rows
    stage, few_stage = made(False), made(few > 0)

    @inline
    def either(num_rows, *arguments):
        if few > 0:
            if num_rows <= few:
                few_stage(*arguments)
            else:
                stage(*arguments)
        else:
            stage(*arguments)

    return either
