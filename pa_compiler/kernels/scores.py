"""What a score becomes between qk_matmul and the softmax: soft cap, score_mod, ALiBi; and which keys are seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.kernels import functions
from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.computed import (
    Computed,
    compute_rows,
    compute_steps,
    head_of,
)
from pa_compiler.kernels.kept import Kept, Value
from pa_compiler.kernels.rows import AnyRows, OfRows, of_row
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.tokens import Tile
from pa_compiler.score import Term
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


class Zeros(NamedTuple):
    """What zero points of keys add to scores: that of the token times the sum of the row's query.

    Attributes:
        tokens: [tokens], with the scale of scores in them.
        sums: [slots, rows].
        slot: Which of the slots.
    """

    tokens: Buffer
    sums: Buffer
    slot: Expr


class Units(NamedTuple):
    """What the products of integers count: [slots, rows], and which of the slots."""

    of_rows: Buffer
    slot: Expr


class Scoring(NamedTuple):
    """What scores depend on besides queries and keys.

    Attributes:
        rows: The rows of the head tile.
        query_pos: Position of their query token in its sequence; OfRows where they have several.
        slopes: alibi_slopes, float32 [num_heads]; None where the spec has none.
        computed: What its functions take; None where it has none.
        factors: [tokens], what products are multiplied by where that is the token's; None: the scale of scores.
        zeros: What is added to the products of tokens then; None: nothing.
        units: What products count, where they are int32; None: they are numbers.
    """

    rows: AnyRows
    query_pos: Expr | OfRows
    slopes: Any
    computed: Computed | None = None
    factors: Buffer | None = None
    zeros: Zeros | None = None
    units: Units | None = None

    def product(self, score: Expr, scale: Expr, row: Expr, column: Expr) -> Value:
        """A score of a row and a column, scaled."""
        if self.factors is None:
            return Value(score * scale, [score])
        number, reads = score, [score, self.factors[column]]
        if self.units is not None:
            unit = self.units.of_rows[self.units.slot, row]
            number, reads = T.Cast("float32", score) * unit, [*reads, unit]
        found = Value(number * self.factors[column], reads)
        if self.zeros is None:
            return found
        total, of_token = self.zeros.sums[self.zeros.slot, row], self.zeros.tokens[column]
        return Value(found.expression + total * of_token, [*found.reads, total, of_token])

    @property
    def regions(self) -> list[BufferRegion]:
        """The arrays that are read besides scores, for T.reads."""
        slopes = [] if self.slopes is None else [whole(self.slopes)]
        slopes += [] if self.factors is None else [whole(self.factors)]
        slopes += [] if self.units is None else [whole(self.units.of_rows)]
        slopes += [] if self.zeros is None else [whole(self.zeros.sums), whole(self.zeros.tokens)]
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
        scales: Those of codes (kernels/scales.py); None where there are none.
    """

    seq: Expr
    query_pos: Expr
    slopes: Buffer | None
    scale: Expr
    headroom: Expr
    computed: Computed | None
    scales: Any = None


def slope_of(scoring: Scoring, row: Expr) -> Expr:
    """The slope of a row; 0 of a row that pads the tile."""
    return T.if_then_else(row < scoring.rows.num, scoring.slopes[scoring.rows.at(row)[1]], T.float32(0))


def capped(spec: PagedAttentionSpec, score: Expr, tanh: Callable[[Expr], Expr] = functions.tanh) -> Expr:
    """A scaled score with the soft cap of the spec, if it has one."""
    if spec.softcap is None:
        return score
    return T.float32(spec.softcap) * tanh(score * T.float32(1 / spec.softcap))


class KeptScores(NamedTuple):
    """What of score_mod is computed before it: for rows, and steps for each score."""

    rows: Kept
    steps: Kept


class Scores:
    """What becomes of the scores of one stage."""

    def __init__(self, spec: PagedAttentionSpec, tiling: Tiling) -> None:
        self._spec, self._tiling = spec, tiling
        self._functions = ScoreFunctions(spec, many_tokens=tiling.many_tokens, attends=tiling.attends)

    def keep(self, score: Callable[..., Value], scoring: Scoring, groups: Expr) -> KeptScores | None:
        """Emit what is kept of score_mod, over some token groups.

        score is that of a row and a column, scaled.
        """
        of_spec, computed = self._functions, scoring.computed
        if of_spec.score is None or computed is None:
            return None
        rows = compute_rows(of_spec.score_rows, self._tiling.row_tile, computed, scoring.rows, of_spec.num_heads)

        def value(term: Term, steps: Mapping[Term, Expr], row: Expr, column: Expr) -> Value:
            return self._modified(term, score(row, column), scoring, {**rows(row), **steps}, row, column)

        return KeptScores(rows, compute_steps("score_step", of_spec.score_steps, self._tiling, value, groups))

    def scored(
        self,
        score: Value,
        scoring: Scoring,
        slope: Expr | None,
        kept: KeptScores | None,
        tile: Tile,
        row: Expr,
        column: Expr,
    ) -> Value:
        """A scaled score with the soft cap, with score_mod, and with the bias of the distance of its key.

        slope is slope_of its row, kept is keep's; column is the key's in its tile.
        """
        if kept is None or self._functions.score is None:
            result = score._replace(expression=capped(self._spec, score.expression))
        else:
            known = {**kept.rows(row), **kept.steps(row, column)}
            result = self._modified(self._functions.score, score, scoring, known, row, column)
        if self._spec.alibi:
            query_pos = of_row(scoring.query_pos, row)
            of_rows = [query_pos] if isinstance(scoring.query_pos, OfRows) else []
            distance = T.Cast("float32", tile.position(column) - query_pos)
            result = Value(result.expression + slope * distance, [*result.reads, slope, *of_rows])
        return result

    def _modified(
        self, term: Term, score: Value, scoring: Scoring, kept: Mapping[Term, Expr], row: Expr, column: Expr
    ) -> Value:
        """A term of score_mod for a scaled score."""
        computed = scoring.computed
        assert computed is not None  # as there are functions
        known = {**computed.of_columns(self._functions, column), **kept}
        head = head_of(scoring.rows, row, self._spec.num_heads)
        modified = score._replace(expression=capped(self._spec, score.expression))
        return computed.value(term, known, row, score=modified, head=head)


def are_products(spec: PagedAttentionSpec) -> bool:
    """Whether scores are products with the scale and nothing else, and no function hides keys."""
    return spec.softcap is None and not spec.alibi and not spec.functions


def sees(scoring: Scoring, tile: Tile, group: Expr, lane: Expr, place: tuple[Expr, Expr, Expr]) -> Value:
    """Whether lane `lane` of token group `group` has a token that is seen; place is its slot, row and column."""
    if tile.sight is None:
        holds = Value(tile.holds(group, lane), ())
    else:
        position = tile.start + group * tile.tiling.token_group + lane
        holds = Value(tile.sight.sees(place[1], position), tile.sight.reads(place[1]))
    if scoring.computed is None or scoring.computed.visible is None:
        return holds
    visible = scoring.computed.visible.sees(*place)
    return Value(T.And(holds.expression, visible.expression), [*holds.reads, *visible.reads])
