"""What a score becomes between its product and the softmax: the CPU's functions, for rows in a lane's registers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Let, Var

from pa_compiler.bounds import bounds
from pa_compiler.cuda.kernels.sight import AFTER, FIRST, LAST_BEGIN, LEAST_LIMIT, RUNS, Sight
from pa_compiler.cuda.kernels.state import Registers
from pa_compiler.cuda.tiles import fence
from pa_compiler.kernels.functions import tanh
from pa_compiler.kernels.rows import AnyRows, begins_late, sees_any
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.scores import capped
from pa_compiler.kernels.terms import lowered
from pa_compiler.score import Term
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


class Tile(NamedTuple):
    """A tile of tokens: its rows are tokens in their order.

    Attributes:
        start: Position of its first token in the sequence.
        valid_len: Tokens that there are; the rows after them hold none.
    """

    start: Expr
    valid_len: Expr

    def position(self, row: Expr) -> Expr:
        """Position in its sequence of the token in a row."""
        return self.start + row


class Scoring(NamedTuple):
    """What scores depend on besides queries and keys.

    Attributes:
        seq: The sequence's number in the batch, int32.
        context_len: Its tokens.
        batch: Sequences of the call.
        rows: The rows of the tile.
        slopes: Of the rows that a lane has, by their registers of row_max, float32; None where the spec has no ALiBi.
        arrays: Inputs and constants of functions, by name.
        sight: What rows of several query tokens see; None in decode, where all see the range's keys.
    """

    seq: Expr
    context_len: Expr
    batch: Expr
    rows: AnyRows
    slopes: Buffer | None
    arrays: Mapping[str, Buffer]
    sight: Sight | None

    def query_pos(self, register: Expr | None) -> Expr:
        """The position of the query token of a row; in decode, where there is one, of none in particular."""
        return self.context_len - 1 if self.sight is None else self.sight.positions[register]


def load_slopes(registers: Registers) -> Callable[..., None]:
    """slopes[i] = the slope of a lane's row i; 0 of a row that pads the tile."""

    @inline
    def stage(alibi_slopes, slope_head, rows, lane, slopes):
        for i in T.unroll(registers.rows):
            row = T.meta_var(registers.row_of(i, lane))
            slopes[i] = T.float32(0)
            if row < rows.num:
                slopes[i] = alibi_slopes[T.Cast("int64", rows.at(row)[1]) * slope_head]

    return stage


class Functions:
    """The score functions of a spec, of which a score is one expression, and whether its key is seen another.

    In decode a mask that does not go by the head is applied twice: what it hides is not copied, so that nothing of it
    enters, and its zeros are no scores. What some rows see and others do not is read, and the strategies keep it out.

    Attributes:
        many_tokens: Whether the rows of a tile are those of several query tokens.
        arrays: The names of the arrays that they read.
        hides_tokens: Whether some tokens between the first of a range and the last are seen by no row.
        by_row: Whether rows see different keys.
    """

    def __init__(self, spec: PagedAttentionSpec, many_tokens: bool = False) -> None:
        self._spec, self._functions = spec, ScoreFunctions(spec, many_tokens=many_tokens)
        self.many_tokens, self.arrays = many_tokens, self._functions.arrays
        self.by_row = many_tokens or self._functions.by_row
        self._intervals = len(bounds(spec, many_tokens).intervals)
        of_mask = self._functions.mask is not None and not self.by_row
        of_tokens = many_tokens and begins_late(spec, many_tokens)
        self.hides_tokens = self._intervals > 1 or of_mask or of_tokens

    def tile_is_seen(self, scoring: Scoring, start: Expr, tokens: int) -> Expr | bool:
        """Whether a token of [start, start + tokens), in the range, is in the bounds of what is seen."""
        return self._in_bounds(scoring, start, start + tokens) if self._intervals > 1 or self.many_tokens else True

    def shows(self, scoring: Scoring, position: Expr) -> Expr:
        """Whether some row sees the token at a position of the range; of a mask by row, as far as its bounds say."""
        conditions = []
        if self._intervals > 1 or self.many_tokens:
            conditions.append(self._in_bounds(scoring, position, position + 1))
        if self._functions.mask is not None and not self.by_row:
            conditions.append(self._value(self._functions.mask, scoring, position, None))
        return conditions[0] if len(conditions) == 1 else T.And(*conditions)

    def all_see(self, scoring: Scoring, start: Expr, tokens: int) -> Expr | bool:
        """Whether all rows, of several query tokens, see all tokens of [start, start + tokens)."""
        if self._functions.mask is not None or scoring.sight is None:
            return False
        reach, after = scoring.sight.reach, start + tokens
        return T.And(T.And(reach[LAST_BEGIN] <= start, after <= reach[LEAST_LIMIT]), after <= scoring.sight.tree.first)

    def sees(self, scoring: Scoring, register: Expr, row: Expr, tile: Tile, token: Expr) -> Expr:
        """Whether a row sees the token in a row of the ring, if there is one. register is that of its row_max.

        But for what a tree hides: in_tree and hidden.
        """
        position, sight = tile.position(token), scoring.sight
        sees = token < tile.valid_len if sight is None else sight.sees(register, position)
        if self._functions.mask is None:
            return sees
        mask = self._value(self._functions.mask, scoring, position, register, head=self._head(scoring, row))
        return T.And(sees, mask)

    def in_tree(self, scoring: Scoring, start: Expr, tokens: int) -> Expr | bool:
        """Whether one of the tokens from start on may be hidden by a tree."""
        return False if scoring.sight is None else start + tokens > scoring.sight.tree.first

    def hidden(self, scoring: Scoring, register: Expr, tile: Tile, token: Expr) -> Expr:
        """Whether a tree hides a token from a row."""
        assert scoring.sight is not None
        return scoring.sight.hides(register, tile.position(token))

    def scored(self, score: Expr, scoring: Scoring, register: Expr, row: Expr, tile: Tile, token: Expr) -> Expr:
        """A scaled score with the soft cap, score_mod and ALiBi."""
        spec, function, position = self._spec, self._functions.score, tile.position(token)
        score = capped(spec, score, lambda x: tanh(x, _quotient))
        if function is not None:
            value = Var("score", "float32")
            of_head = self._head(scoring, row)
            score = Let(value, score, self._value(function, scoring, position, register, head=of_head, score=value))
        if scoring.slopes is not None:
            distance = position - scoring.query_pos(register)
            score = score + scoring.slopes[register] * T.Cast("float32", distance)
        return score

    def _in_bounds(self, scoring: Scoring, first: Expr, after: Expr) -> Expr:
        """Whether one of the tokens from first to after - 1 is in an interval of what is seen."""
        if scoring.sight is None:
            return sees_any(self._spec, scoring.context_len, first, after)
        reach = scoring.sight.reach
        if self._intervals == 1:
            return T.And(reach[FIRST] < after, first < reach[AFTER])
        runs = [(reach[RUNS + 2 * i], reach[RUNS + 2 * i + 1]) for i in range(self._intervals)]
        return functools.reduce(T.Or, (T.max(begin, first) < T.min(end, after) for begin, end in runs))

    def _head(self, scoring: Scoring, row: Expr) -> Expr:
        """The query head; of a row that pads the tile one that there is, so that arrays are read within."""
        return T.min(scoring.rows.at(row)[1], self._spec.num_heads - 1)

    def _value(self, term: Term, scoring: Scoring, position: Expr, register: Expr | None, **arguments: Expr) -> Expr:
        """A term for the key at a position; past the sequence's end as for its last."""
        last, query_pos = T.max(scoring.context_len - 1, 0), T.max(scoring.query_pos(register), 0)
        known = {"batch": scoring.seq, "query_pos": query_pos, "key_pos": T.min(position, last)}
        known["batch_size"] = scoring.batch
        return lowered(term, known | arguments, scoring.arrays, {}, fence).expression


def _quotient(a: Expr, b: Expr) -> Expr:
    """a / b rounded nearly as it should be, for b that is far from both ends of float32.

    From an approximate reciprocal and what it leaves. The division of C calls a function, for whose sake registers are
    saved in memory.
    """
    dividend, divisor, near = Var("dividend", "float32"), Var("divisor", "float32"), Var("near", "float32")
    inverse = Var("inverse", "float32")
    exact = near + (dividend - near * divisor) * inverse
    exact = Let(inverse, T.cuda.fdividef(T.float32(1), divisor), Let(near, dividend * inverse, exact))
    return Let(dividend, a, Let(divisor, b, exact))
