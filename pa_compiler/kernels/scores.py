"""What a score becomes between qk_matmul and the softmax: soft cap, score_mod, ALiBi; and which keys are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.kernels import functions
from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.computed import (
    Computed,
    KeptRows,
    allocate_visible,
    compute_columns,
    compute_rows,
    compute_visible,
    head_of,
)
from pa_compiler.kernels.rows import AnyRows, OfRows, of_row
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.tokens import Tile
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


class Scoring(NamedTuple):
    """What scores depend on besides queries and keys.

    Attributes:
        rows: The rows of the head tile.
        query_pos: Position of their query token in its sequence; OfRows where they have several.
        slopes: alibi_slopes, float32 [num_heads]; None where the spec has none.
        computed: What its functions take; None where it has none.
    """

    rows: AnyRows
    query_pos: Expr | OfRows
    slopes: Any
    computed: Computed | None = None

    @property
    def regions(self) -> list[BufferRegion]:
        """The arrays that are read besides scores, for T.reads."""
        slopes = [] if self.slopes is None else [whole(self.slopes)]
        return slopes + ([] if self.computed is None else self.computed.regions)


class Sequence(NamedTuple):
    """What the stages need of the sequence that they work on.

    Attributes:
        seq: Its number in the batch.
        query_pos: Position of its query token.
        slopes: alibi_slopes, or None.
        scale: What products are multiplied by.
        headroom: Its binary places (kernels/headroom.py).
        computed: What functions of scores take; None where there are none.
    """

    seq: Expr
    query_pos: Expr
    slopes: Buffer | None
    scale: Expr
    headroom: Expr
    computed: Computed | None


def slope_of(scoring: Scoring, row: Expr) -> Expr:
    """The slope of a row; 0 of a row that pads the tile."""
    return T.if_then_else(row < scoring.rows.num, scoring.slopes[scoring.rows.at(row)[1]], T.float32(0))


def capped(spec: PagedAttentionSpec, score: Expr, tanh: Callable[[Expr], Expr] = functions.tanh) -> Expr:
    """A scaled score with the soft cap of the spec, if it has one."""
    if spec.softcap is None:
        return score
    return T.float32(spec.softcap) * tanh(score * T.float32(1 / spec.softcap))


class Scores:
    """What becomes of the scores of one stage."""

    def __init__(self, spec: PagedAttentionSpec, tiling: Tiling) -> None:
        self._spec, self._rows = spec, tiling.row_tile
        self._functions = ScoreFunctions(spec, many_tokens=tiling.many_tokens)

    def of_rows(self, scoring: Scoring) -> KeptRows | None:
        """Emit what of score_mod goes by the row alone."""
        if self._functions.score is None or scoring.computed is None:
            return None
        return compute_rows(
            self._functions.score_rows, self._rows, scoring.computed, scoring.rows, self._spec.num_heads
        )

    def scored(
        self,
        score: Expr,
        scoring: Scoring,
        slope: Expr | None,
        kept: KeptRows | None,
        tile: Tile,
        row: Expr,
        column: Expr,
    ) -> Expr:
        """A scaled score with the soft cap, with score_mod, and with the bias of the distance of its key.

        slope is slope_of its row, kept is of_rows; column is the key's in its tile.
        """
        spec, of_spec = self._spec, self._functions
        score = capped(spec, score)
        computed = scoring.computed
        if kept is not None and computed is not None and of_spec.score is not None:
            head = head_of(scoring.rows, row, spec.num_heads)
            known = computed.of_columns(of_spec, column) | kept(row)
            score = computed.value(of_spec.score, known, row, score=score, head=head)
        if spec.alibi:
            score = score + slope * T.Cast("float32", tile.position(column) - of_row(scoring.query_pos, row))
        return score


def sees(scoring: Scoring, tile: Tile, group: Expr, lane: Expr, place: tuple[Expr, Expr, Expr]) -> Expr:
    """Whether lane `lane` of token group `group` has a token that is seen; place is its slot, row and column."""
    if tile.sight is None:
        holds = tile.holds(group, lane)
    else:
        holds = tile.sight.sees(place[1], tile.start + group * tile.tiling.token_group + lane)
    visible = None if scoring.computed is None else scoring.computed.visible
    return holds if visible is None else T.And(holds, visible.sees(*place))


def compute_block(functions: ScoreFunctions, tiling: Tiling) -> Callable[..., Computed | None]:
    """What of the functions of scores does not go by the score, for a block of one sequence."""
    columns_stage, visible_stage = compute_columns(functions, tiling), compute_visible(functions, tiling)

    def stage(
        arrays: dict[str, Buffer], rows: AnyRows, context_len: Expr, tile: Tile, num_groups: Expr
    ) -> Computed | None:
        columns = columns_stage(arrays, rows.token, context_len, tile, num_groups)
        computed = allocate_visible(functions, tiling, columns, 1)
        visible_stage(computed, rows, 0, num_groups)
        return computed

    return stage
