"""Sight: which keys each row sees, where the rows of a tile are those of several query tokens.

A query token sees the keys from a begin up to a limit; of a tree of guesses, of these what its mask says. All of it is
known before the first key is read, and asked in three places: how far a tile of rows goes through the keys, which
scores count, and which words of values are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.bounds import bounds as bounds_of
from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.elements import HIGH, LOW
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.kept import allocate
from pa_compiler.kernels.rows import BEYOND, OfRows, TokenRows, begins_late, first_seen, intervals, limit
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline

LEAST_LIMIT, LIMIT, BEGIN, LAST_BEGIN = range(4)
"""What Bounds.reach has of a tile: the least limit of its rows and the greatest, and the same of their begins."""


class Tree(NamedTuple):
    """Which of its sequence's own query tokens each query token sees, if the call has a tree_mask.

    Attributes:
        mask: [tree_cells], uint8.
        start: Where the row of the item's first query token begins in it, int64; -1 without a tree.
        size: Query tokens of the sequence.
        first: Position of the first of them.
    """

    mask: Buffer
    start: Expr
    size: Expr
    first: Expr

    @property
    def present(self) -> Expr:
        """Whether there is one."""
        return self.start >= T.int64(0)

    def hides(self, nth: Expr, position: Expr) -> Expr:
        """Whether query token nth of the item does not see the key at a position from `first` on."""
        row = self.start + T.Cast("int64", nth) * T.Cast("int64", self.size)
        return self.mask[row + T.Cast("int64", position - self.first)] == T.uint8(0)


class Bounds(NamedTuple):
    """What the rows of all tiles of an item see.

    Attributes:
        positions: Of the rows' query tokens, [tiles, rows], int32.
        limits, begins: From begin up to limit a row sees keys, [tiles, rows], int32; begins is None where all are 0.
        places: headroom of each row, [tiles, rows], int32; None where it is 0.
        reach: [tiles, 4], int32: the LEAST_LIMIT, the LIMIT, the BEGIN and the LAST_BEGIN of a tile's rows.
    """

    positions: Buffer
    limits: Buffer
    begins: Buffer | None
    places: Buffer | None
    reach: Buffer

    def headroom(self, tile: Expr) -> OfRows | Expr:
        """The binary places of a tile's weights."""
        return T.int32(0) if self.places is None else OfRows(self.places, tile)


class Sight(NamedTuple):
    """What the rows of one tile see.

    Attributes:
        bounds: Of all tiles of the item.
        tile: Which of them.
        rows: Its rows.
        tree: The tree_mask.
    """

    bounds: Bounds
    tile: Expr
    rows: TokenRows
    tree: Tree

    def sees(self, row: Expr, position: Expr) -> Expr:
        """Whether a row sees the key at a position, but for what a tree hides."""
        before = position < self.bounds.limits[self.tile, row]
        if self.bounds.begins is None:
            return before
        return T.And(before, position >= self.bounds.begins[self.tile, row])

    def reads(self, row: Expr) -> list[Expr]:
        """What sees reads, for T.reads."""
        return [each[self.tile, row] for each in (self.bounds.limits, self.bounds.begins) if each is not None]

    def reach(self, which: int) -> Expr:
        """A number of Bounds.reach."""
        return self.bounds.reach[self.tile, which]


def find_bounds(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """bounds of a tile's rows. positions has where in its sequence each query token of the call is.

    A token sees what comes before it and itself, as far as the mask has it; with sees_all, up to the last of the
    sequence's context_len tokens. Of a prefix that sequences share, context_len is its length, and tokens are after it.
    Rows that pad the tile are as the last one.
    """
    rows, late, wide = tiling.row_tile, begins_late(spec, many_tokens=True), spec.wide_range

    @inline
    def stage(bounds, tile, of, positions, context_len, sees_all):
        with T.sblock("bounds"):
            T.reads(positions[of.token : of.token + of.num_tokens])
            T.writes(bounds.positions[tile, 0:rows], bounds.limits[tile, 0:rows], bounds.reach[tile, 0:4])
            for r in range(rows):
                with T.sblock("row_bounds"):
                    vr = T.axis.spatial(rows, r)
                    position: T.let = positions[of.token + of.nth_token(T.min(vr, of.num - 1))]
                    seen: T.let = T.Select(sees_all, context_len, position + 1)
                    bounds.positions[tile, vr] = position
                    bounds.limits[tile, vr] = T.min(limit(spec, seen, position + 1), context_len)
                    if late:
                        bounds.begins[tile, vr] = first_seen(spec, seen, position + 1)
                    if wide:
                        bounds.places[tile, vr] = headroom(spec, seen)
            for r in range(rows):
                with T.sblock("reach"):
                    vr = T.axis.opaque(rows, r)
                    own: T.let = bounds.limits[tile, vr]
                    begin: T.let = bounds.begins[tile, vr] if late else T.int32(0)
                    bounds.reach[tile, 0] = T.Select(vr == 0, own, T.min(bounds.reach[tile, 0], own))
                    bounds.reach[tile, 1] = T.Select(vr == 0, own, T.max(bounds.reach[tile, 1], own))
                    bounds.reach[tile, 2] = T.Select(vr == 0, begin, T.min(bounds.reach[tile, 2], begin))
                    bounds.reach[tile, 3] = T.Select(vr == 0, begin, T.max(bounds.reach[tile, 3], begin))

    return stage


def find_runs(spec: PagedAttentionSpec) -> Callable[..., Buffer | None]:
    """runs[i] = from which block up to which one the query tokens of an item see keys, of interval i of the bounds.

    Blocks that are in no run are seen by none of the tokens. None where there is one interval, with no blocks between.
    """
    num_intervals = len(bounds_of(spec, many_tokens=True).intervals)

    def widen(runs: Buffer, nth: Expr, ends: list[tuple[Expr, Expr]]) -> None:
        for i, (begin, end) in enumerate(ends):
            is_empty, first, after = end <= begin, *(T.floordiv(each, spec.block_size) for each in (begin, end - 1))
            first, after = T.Select(is_empty, T.int32(BEYOND), first), T.Select(is_empty, T.int32(0), after + 1)
            T.buffer_store(runs, T.Select(nth == 0, first, T.min(runs[i, 0], first)), [i, 0])
            T.buffer_store(runs, T.Select(nth == 0, after, T.max(runs[i, 1], after)), [i, 1])

    @inline
    def fill(runs, token_begin, num_query, positions, context_len, sees_all):
        for token in range(num_query):
            with T.sblock("runs"):
                vtoken = T.axis.opaque(num_query, token)
                T.reads(whole(runs), positions[token_begin + vtoken])
                T.writes(whole(runs))
                query_end: T.let = positions[token_begin + vtoken] + 1
                seen: T.let = T.Select(sees_all, context_len, query_end)
                widen(runs, vtoken, intervals(spec, seen, query_end))

    def stage(*item: Expr) -> Buffer | None:
        if num_intervals == 1:
            return None
        runs = allocate("runs", (num_intervals, 2), "int32")
        fill(runs, *item)
        return runs

    return stage


def hide_scores() -> Callable[..., None]:
    """The scores of keys that a tree hides from a row count as -inf."""

    @inline
    def stage(scaled, tile):
        sight = T.meta_var(tile.sight)
        tree = T.meta_var(sight.tree)
        if tree.present:
            first = T.meta_var(T.max(tree.first - tile.start, 0))
            for r, c in T.grid(sight.rows.num, T.max(tile.valid_len - first, 0)):
                with T.sblock("hidden_scores"):
                    vr = T.axis.opaque(scaled.shape[0], r)
                    vc = T.axis.opaque(scaled.shape[1], first + c)
                    T.reads(scaled[vr, vc], whole(tree.mask))
                    T.writes(scaled[vr, vc])
                    scaled[vr, vc] = T.Select(
                        tree.hides(sight.rows.nth_token(vr), tile.start + vc), T.float32("-inf"), scaled[vr, vc]
                    )

    return stage


def find_edges(tiling: Tiling) -> Callable[..., None]:
    """edges[r, i] = the word of ones or zeros for operand i of pv_matmul, after the first num_full token groups.

    All of a word that row r sees is ones: of pairs, each column has half of a word.
    """
    rows, terms, tokens = tiling.row_tile, tiling.values.terms, tiling.padded_kv_tile
    group = tiling.token_group // terms

    def ones(seen):
        return T.Select(seen, T.int32(-1), T.int32(0))

    def word(tile, row, at):
        position = tile.start + at * terms
        if terms == 1:
            return ones(tile.sight.sees(row, position))
        low = T.bitwise_and(ones(tile.sight.sees(row, position)), LOW)
        return T.bitwise_or(low, T.bitwise_and(ones(tile.sight.sees(row, position + 1)), HIGH))

    @inline
    def stage(edges, tile, num_full):
        sight = T.meta_var(tile.sight)
        tree = T.meta_var(sight.tree)
        with T.sblock("edges"):
            T.reads()
            T.writes(edges[0:rows, 0 : tokens // terms])
            for r, to, ti in T.grid(rows, tile.num_groups - num_full, group):
                with T.sblock("edge"):
                    vt = T.axis.spatial(tokens // terms, (num_full + to) * group + ti)
                    vr = T.axis.spatial(rows, r)
                    edges[vr, vt] = word(tile, vr, vt)
            if tree.present:
                first = T.meta_var(T.max(tree.first - tile.start, 0))
                for r, c in T.grid(sight.rows.num, T.max(tile.valid_len - first, 0)):
                    with T.sblock("hidden_words"):
                        vr = T.axis.opaque(rows, r)
                        vc = T.axis.opaque(tokens, first + c)
                        T.reads(edges[vr, T.floordiv(vc, terms)], whole(tree.mask))
                        T.writes(edges[vr, T.floordiv(vc, terms)])
                        edges[vr, T.floordiv(vc, terms)] = T.bitwise_and(
                            edges[vr, T.floordiv(vc, terms)],
                            T.Select(
                                tree.hides(sight.rows.nth_token(vr), tile.start + vc),
                                T.Select(T.floormod(vc, 2) == 0, HIGH, LOW) if terms == 2 else 0,
                                -1,
                            ),
                        )

    return stage
