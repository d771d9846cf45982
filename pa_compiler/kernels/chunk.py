"""A chunk of the staged pipeline: what each of its places is for, and the tokens of a block that it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer

from pa_compiler.kernels.caches import CacheAccess, whole
from pa_compiler.kernels.computed import Computed, Visible, allocate_visible, compute_columns, compute_visible
from pa_compiler.kernels.kept import Value, allocate, fill
from pa_compiler.kernels.rows import Rows, begins_late, first_read, first_seen, limit, masks_first_tile, sees_block
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.sight import Tree
from pa_compiler.kernels.tokens import Tile, token_offsets
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


class Place(NamedTuple):
    """What a place of a chunk is for: in decode a sequence, in attend one query token of a sequence.

    Attributes:
        seq: The sequence.
        token: The query token, an index into query, out and lse.
        length: The tokens of the sequence that it may see, but for window and mask.
        query_end: One more than its position; None where that is length.
        nth: Which of its sequence's query tokens of this chunk it is, in attend.
    """

    seq: Expr
    token: Expr
    length: Expr
    query_end: Expr | None = None
    nth: Expr | None = None

    @property
    def query_pos(self) -> Expr:
        """The position of the query token."""
        return (self.length if self.query_end is None else self.query_end) - 1

    def rows(self, head_start: Expr, num_rows: Expr) -> Rows:
        """The rows of a tile of heads."""
        return Rows(self.token, head_start, num_rows)


class Queries(NamedTuple):
    """The query tokens of a chunk in attend: a run of those of one sequence, as parameters of a kernel."""

    seq: Expr
    token_begin: Expr
    first_pos: Expr
    sees_all: Expr

    def place(self, context_lens: Buffer, nth: Expr) -> Place:
        """The place of one of them."""
        # Both read memory. What is bound to a variable and does not, TVM writes out wherever the variable is, and then
        # simplifies for minutes what is nested.
        query_end = T.min(self.first_pos + nth + 1, context_lens[self.seq])
        length = T.Select(self.sees_all != 0, context_lens[self.seq], query_end)
        return Place(self.seq, self.token_begin + nth, length, query_end, nth)


def place_of(tiling: Tiling, context_lens: Buffer, batch_start: Expr, nth: Expr, queries: Queries) -> Place:
    """Place nth of a chunk. batch_start is its first sequence in decode, queries are its query tokens in attend."""
    if tiling.attends:
        return queries.place(context_lens, nth)
    seq = _bound("seq", batch_start + nth)
    return Place(seq, seq, context_lens[seq])


def not_taken(tiling: Tiling) -> tuple[str, ...]:
    """The parameters that a kernel has in the other one of decode and attend."""
    return ("batch_start",) if tiling.attends else (*_OF_QUERIES, "tree_start", "tree_size")


_OF_QUERIES = ("of_seq", "token_begin", "first_pos", "sees_all")
"""The names of the parameters that are Queries."""


def _bound(name: str, value: Expr) -> Expr:
    variable = T.bind(value)
    IRBuilder.name(name, variable)
    return variable


def tile_of(spec: PagedAttentionSpec, tiling: Tiling, place: Place, block_idx: Expr) -> Tile:
    """Block block_idx of a place's sequence, with the tokens of it that are read for the place.

    What a mask says of it is bound once, each in terms of what was bound before: in full, all that names the tile would
    have it several times over, and TVM takes minutes to simplify an extent of nested minima and choices.
    """
    many_tokens, size = place.query_end is not None, spec.block_size
    start, end, seen = block_idx * size, limit(spec, place.length, place.query_end), None
    if begins_late(spec, many_tokens):
        seen = _bound("first_seen", first_seen(spec, place.length, place.query_end))
        first = first_read(spec, seen, many_tokens)
        # a choice: of a maximum TVM would make sizes of buffers, on CUDA
        start = _bound("start", T.if_then_else(start < first, first, start))
        tokens = T.max(T.min(end, (block_idx + 1) * size) - start, 0)
    else:
        tokens = T.max(T.min(end - start, size), 0)
    sees = sees_block(spec, place.length, block_idx, place.query_end)
    valid_len = _bound("valid_len", tokens if sees is None else T.Select(sees, tokens, 0))
    return Tile(tiling, start, valid_len, seen if masks_first_tile(spec, many_tokens) else None)


def look_up(spec: PagedAttentionSpec, tiling: Tiling, access: CacheAccess) -> Callable[..., None]:
    """Where the tokens of a block lie."""
    offsets_stage = token_offsets(spec, access)

    @inline
    def stage(table, cache, tile, seq):
        num_offsets: T.let = tile.num_groups * tiling.token_group
        offsets_stage(table, cache, tile, seq, tile.start + tile.valid_len - 1, num_offsets)

    return stage


def compute_block(functions: ScoreFunctions, tiling: Tiling) -> Callable[..., Computed | None]:
    """What of the functions of scores does not go by the score, for a block; and what a tree hides of it."""
    columns_stage, visible_stage = compute_columns(functions, tiling), compute_visible(functions, tiling)
    hide_stage = _hide(tiling)

    def stage(
        arrays: dict[str, Buffer], place: Place, rows: Rows, tile: Tile, num_groups: Expr, tree: Tree | None
    ) -> Computed | None:
        query_pos = None if place.query_end is None else place.query_pos
        columns = columns_stage(arrays, place.seq, place.length, tile, num_groups, query_pos)
        computed = allocate_visible(functions, tiling, columns, 1)
        visible_stage(computed, rows, 0, num_groups)
        if tree is None:
            return computed
        if computed is None:
            computed = Computed({}, place.seq, place.query_pos, tiling.fence)
        visible = computed.visible
        if visible is None:
            words = allocate("visible", (tiling.padded_kv_tile,), "int32")
            fill("every_key", words, lambda column: Value(T.int32(-1), ()), num_groups, tiling.token_group)
            visible = Visible(words, words)
        hide_stage(visible.columns, place.nth, tile, tree)
        return computed._replace(visible=visible)

    return stage


def _hide(tiling: Tiling) -> Callable[..., None]:
    """The sblock tree: 0 in the words of keys that a tree hides from query token nth, whatever a mask says of them."""
    tokens = tiling.padded_kv_tile

    @inline
    def stage(words, nth, tile, tree):
        rows = T.meta_var(1 if len(words.shape) == 1 else tiling.row_tile)
        with T.sblock("tree"):
            T.reads(whole(words), whole(tree.mask))
            T.writes(whole(words))
            if tree.present:
                first = T.meta_var(T.max(tree.first - tile.start, 0))
                for r, c in T.grid(rows, T.max(tile.valid_len - first, 0)):
                    with T.sblock("hidden_keys"):
                        vr = T.axis.opaque(rows, r)
                        vc = T.axis.opaque(tokens, first + c)
                        at = T.meta_var((vc,) if len(words.shape) == 1 else (0, vr, vc))
                        T.reads(words[at], whole(tree.mask))
                        T.writes(words[at])
                        words[at] = T.Select(tree.hides(nth, tile.position(vc)), T.int32(0), words[at])

    return stage
