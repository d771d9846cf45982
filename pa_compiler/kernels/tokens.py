"""Tile: some tokens of a sequence, in the order in which they are read. Here alone is a column's position known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.kernels.caches import CacheAccess, key_access, value_access, whole
from pa_compiler.kernels.sight import Sight
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


class Tile(NamedTuple):
    """A tile of tokens, whose columns are what scores and probabilities are indexed by.

    A column is not always the token of its number. Where tiling.streams is more than 1, as in the sweeps of strategy
    head_dim_in_lanes, a whole tile of kv_tile tokens is read from `streams` places in turn. Scores, probabilities and
    values of a tile then stand in this order, in which the whole tiles of a sequence differ from its last one. A
    maximum and a sum over a tile do not depend on it. What goes by a token's position asks `position`: causality, a
    window, or a bias such as ALiBi's.

    Attributes:
        tiling: The sizes.
        start: Position of the tile's first token in its sequence.
        valid_len: Tokens that there are, up to kv_tile, from the first on; the columns after them hold none.
        first_seen: Position of the first token that is seen, where a tile may begin before it: packed, at a multiple of
            PACKED_TOKENS. None where it does not.
        sight: What each row sees, where they have several query tokens; None where all see all tokens that there are.
    """

    tiling: Tiling
    start: Expr
    valid_len: Expr
    first_seen: Expr | None = None
    sight: Sight | None = None

    def position(self, column: Expr) -> Expr:
        """Position in its sequence of the token in a column."""
        streams, size = self.tiling.streams, self.tiling.kv_tile
        if streams == 1:
            return self.start + column
        in_turn = T.floormod(column, streams) * (size // streams) + T.floordiv(column, streams)
        return self.start + T.Select(self.valid_len == size, in_turn, column)

    def holds(self, group: Expr, lane: Expr) -> Expr:
        """Whether column `lane` of token group `group` holds a token that is seen."""
        before = group * self.tiling.token_group
        holds = lane < self.valid_len - before
        return holds if self.first_seen is None else T.And(holds, lane >= self.first_seen - self.start - before)

    def sees(self, column: Expr) -> Expr:
        """Whether the token in a column is seen, if the column holds one. Only of a tile with a first_seen."""
        return column >= self.first_seen - self.start

    def rest(self, num_full: Expr) -> Expr:
        """Tokens after the first num_full groups: of a tile that all rows see alike, those of no whole group."""
        if self.sight is None:
            return T.floormod(self.valid_len, self.tiling.token_group)
        return self.valid_len - num_full * self.tiling.token_group

    @property
    def num_groups(self) -> Expr:
        """Token groups that hold tokens."""
        return T.ceildiv(self.valid_len, self.tiling.token_group)

    @property
    def num_full(self) -> Expr:
        """Token groups that hold nothing else."""
        return T.floordiv(self.valid_len, self.tiling.token_group)


def token_offsets(spec: PagedAttentionSpec, access: CacheAccess, name: str = "token_offsets") -> Callable[..., None]:
    """cache.offsets[t] = words from the start of a cache to the token in column t of a tile, in kv head 0; int64.

    For t < num_offsets, which may reach into the tile that is read next. Past last_token the last valid token is named
    again, and before first_token that: an offset is always that of a token within the sequence's length, so that what
    is read through the table may be read. With runs, [count, 2] from a block of the sequence up to another one, blocks
    in none of them are not looked up: the first that is stands for them. Products with a stride are int64: caches of
    more than 2**31 elements are ordinary.
    """
    block_size = spec.block_size

    def held(position, first_token, last_token):
        position = T.min(position, last_token)
        return position if first_token is None else T.max(position, first_token)

    def entry(token, runs):
        block = T.floordiv(token, block_size)
        if runs is None:
            return block
        numbers = range(int(runs.shape[0]))
        is_seen = functools.reduce(T.Or, (T.And(runs[i, 0] <= block, block < runs[i, 1]) for i in numbers))
        return T.Select(is_seen, block, functools.reduce(T.min, (runs[i, 0] for i in numbers)))

    @inline
    def stage(table, cache, tile, seq, last_token, num_offsets, first_token=None, runs=None):
        with T.sblock(name):
            T.reads(
                table.entries[seq, 0 : table.entries.shape[1]],
                table.row_starts[seq],
                *([] if runs is None else [whole(runs)]),
            )
            T.writes(whole(cache.offsets))
            row_start: T.let = table.row_starts[seq]
            for t in range(num_offsets):
                with T.sblock("offset"):
                    vt = T.axis.spatial(cache.offsets.shape[0], t)
                    token: T.let = held(tile.position(vt), first_token, last_token)
                    block: T.let = T.Cast("int64", table.entries[seq, row_start + entry(token, runs)])
                    slot: T.let = T.floormod(token, block_size)
                    cache.offsets[vt] = block * cache.block + access.slot_offset(slot, cache.row)

    return stage


def look_up_tokens(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """Where the tokens of a tile lie in both caches, and of the next one where there is one."""
    key_offsets_stage = token_offsets(spec, key_access(spec, tiling))
    value_offsets_stage = token_offsets(spec, value_access(spec, tiling))

    @inline
    def stage(table, keys, values, tile, seq, last_token, has_next, first_token):
        num_offsets: T.let = T.Select(has_next, tiling.num_offsets, tile.num_groups * tiling.token_group)
        last: T.let = last_token
        key_offsets_stage(table, keys, tile, seq, last, num_offsets, first_token)
        if not spec.shared_kv:
            value_offsets_stage(table, values, tile, seq, last, num_offsets, first_token)

    return stage
