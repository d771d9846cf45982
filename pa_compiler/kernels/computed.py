"""What functions of scores compute, in sblocks: for columns, for rows, and which keys a mask shows.

Whether a key is seen is a word of ones or of zeros, with which the words of its values are ANDed: nothing enters of a
value that is not seen, whatever memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.elements import HIGH, LOW
from pa_compiler.kernels.kept import Kept, Value, allocate, fill, kept_dtype, stage_block, written
from pa_compiler.kernels.rows import AnyRows, OfRows, of_row
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.terms import lowered
from pa_compiler.kernels.tokens import Tile
from pa_compiler.score import Term
from pa_compiler.tiles import Tiling


class Visible(NamedTuple):
    """Which keys of a tile a mask shows: -1, all ones, or 0.

    Attributes:
        columns: int32, [tokens]; of a mask that goes by the head [slots, rows, tokens].
        words: The same for each operand of pv_matmul: columns itself, or [..., tokens / 2] for pairs of columns, which
            have half of a word each.
    """

    columns: Buffer
    words: Buffer

    def sees(self, slot: Expr, row: Expr, column: Expr) -> Value:
        """Whether the key in a column is seen."""
        word = _at(self.columns, slot, row, column)
        return Value(tir.NE(word, T.int32(0)), [word])


class Computed(NamedTuple):
    """What the functions of a spec take, and what has been computed of them for a tile of tokens.

    Attributes:
        arrays: Inputs and constants by name.
        batch: The sequence.
        query_pos: Position of its query token, 0 of an empty sequence; OfRows where it has several.
        fence: The target's (Tiling.fence).
        columns: For each of ScoreFunctions.columns its values, [tokens].
        visible: Of a mask, where it has been computed.
    """

    arrays: Mapping[str, Buffer]
    batch: Expr
    query_pos: Expr | OfRows
    fence: Callable[[Expr], Expr]
    columns: Sequence[Buffer] = ()
    visible: Visible | None = None

    @property
    def regions(self) -> list[BufferRegion]:
        """All that an sblock may read of it."""
        visible = [] if self.visible is None else [self.visible.columns]
        return [whole(each) for each in (*self.arrays.values(), *self.columns, *visible)]

    def value(self, term: Term, kept: Mapping[Term, Expr], row: Expr | None = None, **arguments: Expr | Value) -> Value:
        """A term, for a row if it goes by one; kept says where the values of some are."""
        query_pos = of_row(self.query_pos, row)
        known: dict[str, Expr | Value] = {"batch": self.batch, "query_pos": query_pos, **arguments}
        if isinstance(self.query_pos, OfRows):
            known["query_pos"] = Value(query_pos, [query_pos])
        for array in self.arrays.values():
            if not isinstance(array.shape[0], tir.IntImm):
                known["batch_size"] = T.Cast("int32", array.shape[0])
        return lowered(term, known, self.arrays, kept, self.fence)

    def of_columns(self, functions: ScoreFunctions, column: Expr) -> dict[Term, Expr]:
        """What is kept for a column."""
        return Kept(functions.columns, self.columns)(column)


def words_of(computed: Computed | None, slot: Expr, row: Expr, index: Expr) -> list[Expr]:
    """The word for an operand of pv_matmul, where a mask has one."""
    visible = None if computed is None else computed.visible
    return [] if visible is None else [_at(visible.words, slot, row, index)]


def compute_columns(functions: ScoreFunctions, tiling: Tiling) -> Callable[..., Computed | None]:
    """The sblock columns: all that goes by no head, over the first num_groups token groups of a tile.

    None of a spec without functions.

    A column without a token stands for the last token of the sequence: arrays are read within.
    """
    tokens = tiling.padded_kv_tile

    def stage(
        arrays: Mapping[str, Buffer],
        seq: Expr,
        context_len: Expr,
        tile: Tile,
        num_groups: Expr,
        query_pos: Expr | None = None,
    ) -> Computed | None:
        if not functions.present:
            return None
        last = T.bind(T.max(context_len - 1, 0))
        computed = Computed(arrays, seq, last if query_pos is None else query_pos, tiling.fence)
        if not functions.any_columns:
            return computed
        kept = [allocate("column_term", (tokens,), kept_dtype(term)) for term in functions.columns]
        fills = [(f"column_{number}", *pair) for number, pair in enumerate(zip(kept, functions.columns, strict=True))]
        visible = None
        if functions.mask is not None and not functions.by_row:
            visible = _allocate_visible(tiling)
            fills.append(("visible", visible.columns, functions.mask))
        with stage_block("columns", computed.regions, [*kept, *_buffers(visible)]):
            for number, (name, buffer, term) in enumerate(fills):
                before = Kept(functions.columns[:number], kept[:number])

                def value(column: Expr, term: Term = term, before: Kept = before) -> Value:
                    key_pos = T.max(T.min(tile.position(column), last), T.int32(0))
                    return written(term, computed.value(term, before(column), key_pos=key_pos))

                fill(name, buffer, value, num_groups, tiling.token_group)
            _fill_pairs(visible, num_groups, tiling)
        return computed._replace(columns=kept, visible=visible)

    return stage


def compute_visible(functions: ScoreFunctions, tiling: Tiling) -> Callable[..., None]:
    """The sblock visible_rows: of a mask that goes by the head, which keys each row of a slot sees.

    Nothing of other masks.
    """
    rows, mask = tiling.row_tile, functions.mask

    def stage(given: Computed | None, of: AnyRows, slot: Expr, num_groups: Expr) -> None:
        if given is None or given.visible is None or mask is None or not functions.by_row:
            return
        visible, computed = given.visible, given._replace(visible=None)
        with stage_block("visible_rows", computed.regions, _buffers(visible)):
            kept = compute_rows(functions.mask_rows, rows, computed, of, functions.num_heads)

            def value(term: Term, steps: Mapping[Term, Expr], row: Expr, column: Expr) -> Value:
                known = {**computed.of_columns(functions, column), **kept(row), **steps}
                return computed.value(term, known, row, head=head_of(of, row, functions.num_heads))

            steps = compute_steps("mask_step", functions.mask_steps, tiling, value, num_groups)

            def word(row: Expr, column: Expr) -> Value:
                return written(mask, value(mask, steps(row, column), row, column))

            fill("visible", visible.columns, word, num_groups, tiling.token_group, rows, slot)
            _fill_pairs(visible, num_groups, tiling, rows, slot)

    return stage


def allocate_visible(
    functions: ScoreFunctions, tiling: Tiling, computed: Computed | None, slots: int
) -> Computed | None:
    """computed with a place for what compute_visible computes."""
    if computed is None or not functions.by_row:
        return computed
    return computed._replace(visible=_allocate_visible(tiling, slots, tiling.row_tile))


def compute_rows(terms: Sequence[Term], rows: int, computed: Computed, of: AnyRows, num_heads: int) -> Kept:
    """Sblocks that compute terms for each of some rows."""
    buffers = [allocate("row_term", (rows,), kept_dtype(term)) for term in terms]
    for number, (term, buffer) in enumerate(zip(terms, buffers, strict=True)):
        before = Kept(terms[:number], buffers[:number])

        def value(row: Expr, term: Term = term, before: Kept = before) -> Value:
            return written(term, computed.value(term, before(row), row, head=head_of(of, row, num_heads)))

        fill(f"row_{number}", buffer, value, rows=rows)
    return Kept(terms, buffers)


def compute_steps(
    name: str, terms: Sequence[Term], tiling: Tiling, value: Callable[..., Value], num_groups: Expr
) -> Kept:
    """Sblocks that compute terms for each score of a head tile: value(term, what is kept of it, row, column)."""
    shape = (tiling.row_tile, tiling.padded_kv_tile)
    buffers = [allocate("step", shape, kept_dtype(term)) for term in terms]
    for number, (term, buffer) in enumerate(zip(terms, buffers, strict=True)):
        before = Kept(terms[:number], buffers[:number])

        def of_place(row: Expr, column: Expr, term: Term = term, before: Kept = before) -> Value:
            return written(term, value(term, before(row, column), row, column))

        fill(f"{name}_{number}", buffer, of_place, num_groups, tiling.token_group, tiling.row_tile)
    return Kept(terms, buffers)


def head_of(rows: AnyRows, row: Expr, num_heads: int) -> Expr:
    """The head of a row; of one that pads the tile a head that there is."""
    head = rows.at(row)[1]
    return head if isinstance(rows.num, int) else T.min(head, num_heads - 1)


def _fill_pairs(
    visible: Visible | None, num_groups: Expr, tiling: Tiling, rows: int | None = None, slot: Expr | None = None
) -> None:
    """The words for pairs of columns, where there are such."""
    if visible is None or visible.words is visible.columns:
        return

    def value(*axes: Expr) -> Value:
        *row, pair = axes if slot is None else (slot, *axes)
        places = [(*row, 2 * pair + half) for half in (0, 1)]
        even, odd = (visible.columns[place] for place in places)
        return Value(T.bitwise_or(T.bitwise_and(even, LOW), T.bitwise_and(odd, HIGH)), [whole(visible.columns)])

    fill("visible_pairs", visible.words, value, num_groups, tiling.token_group // 2, rows, slot)


def _allocate_visible(tiling: Tiling, *rows: int) -> Visible:
    columns = allocate("visible", (*rows, tiling.padded_kv_tile), "int32")
    if tiling.values.terms == 1:
        return Visible(columns, columns)
    return Visible(columns, allocate("visible_pairs", (*rows, tiling.padded_kv_tile // 2), "int32"))


def _buffers(visible: Visible | None) -> list[Buffer]:
    if visible is None:
        return []
    return [visible.columns] if visible.words is visible.columns else [visible.columns, visible.words]


def _at(buffer: Buffer, slot: Expr, row: Expr, column: Expr) -> Expr:
    if len(buffer.shape) == 1:
        return buffer[column]
    return buffer[0 if int(buffer.shape[0]) == 1 else slot, row, column]
