"""What a score becomes between its product and the softmax: the CPU's functions, for rows in a lane's registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Let, Var

from pa_compiler.cuda.kernels.state import Registers
from pa_compiler.cuda.tiles import fence
from pa_compiler.kernels.functions import tanh
from pa_compiler.kernels.rows import sees_any
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
        first_head: The query head of the row tile's first row.
        slopes: Of the rows that a lane has, by their registers of row_max, float32; None where the spec has no ALiBi.
        arrays: Inputs and constants of functions, by name.
    """

    seq: Expr
    context_len: Expr
    batch: Expr
    first_head: Expr
    slopes: Buffer | None
    arrays: Mapping[str, Buffer]


def load_slopes(registers: Registers) -> Callable[..., None]:
    """slopes[i] = the slope of a lane's row i; 0 of a row that pads the tile, past `rows`."""

    @inline
    def stage(alibi_slopes, slope_head, first_head, rows, lane, slopes):
        for i in T.unroll(registers.rows):
            head = T.meta_var(registers.head_of(i, lane))
            slopes[i] = T.float32(0)
            if head < rows:
                slopes[i] = alibi_slopes[T.Cast("int64", first_head + head) * slope_head]

    return stage


class Functions:
    """The score functions of a spec, of which a score is one expression, and whether its key is seen another.

    A mask that does not go by the head is applied twice: what it hides is not copied, so that nothing of it enters, and
    its zeros are no scores. What one that goes by the head hides is read for other heads, and fma.py keeps it out.

    Attributes:
        arrays: The names of the arrays that they read.
        hides_tokens: Whether some tokens between the first that is seen and the last are seen by no head.
        by_head: Whether the mask goes by the head.
    """

    def __init__(self, spec: PagedAttentionSpec) -> None:
        self._spec, self._functions = spec, ScoreFunctions(spec)
        self.arrays, self.by_head = self._functions.arrays, self._functions.by_row
        self._has_gaps = sees_any(spec, T.int32(0), T.int32(0), T.int32(0)) is not None
        self.hides_tokens = self._has_gaps or (self._functions.mask is not None and not self.by_head)

    def tile_is_seen(self, scoring: Scoring, start: Expr, tokens: int) -> Expr | bool:
        """Whether a token of [start, start + tokens) is in the bounds of what is seen."""
        if not self._has_gaps:
            return True
        return sees_any(self._spec, scoring.context_len, start, start + tokens)

    def shows(self, scoring: Scoring, position: Expr) -> Expr:
        """Whether some head sees the token at a position; of a mask by the head, as far as its bounds say."""
        conditions = []
        if self._has_gaps:
            conditions.append(sees_any(self._spec, scoring.context_len, position, position + 1))
        if self._functions.mask is not None and not self.by_head:
            conditions.append(self._value(self._functions.mask, scoring, position))
        return conditions[0] if len(conditions) == 1 else T.And(*conditions)

    def sees(self, scoring: Scoring, head: Expr, tile: Tile, row: Expr) -> Expr:
        """Whether a head, counted from the row tile's first, sees the token in a row, if there is one."""
        holds = row < tile.valid_len
        if self._functions.mask is None:
            return holds
        return T.And(
            holds, self._value(self._functions.mask, scoring, tile.position(row), head=self._head(scoring, head))
        )

    def scored(self, score: Expr, scoring: Scoring, register: Expr, head: Expr, tile: Tile, row: Expr) -> Expr:
        """A scaled score with the soft cap, score_mod and ALiBi. register is that of its row's row_max."""
        spec, function = self._spec, self._functions.score
        score = capped(spec, score, lambda x: tanh(x, _quotient))
        if function is not None:
            value = Var("score", "float32")
            of_head = self._head(scoring, head)
            score = Let(value, score, self._value(function, scoring, tile.position(row), head=of_head, score=value))
        if scoring.slopes is not None:
            distance = tile.position(row) - (scoring.context_len - 1)
            score = score + scoring.slopes[register] * T.Cast("float32", distance)
        return score

    def _head(self, scoring: Scoring, head: Expr) -> Expr:
        """The query head; of a row that pads the tile one that there is, so that arrays are read within."""
        return T.min(scoring.first_head + head, self._spec.num_heads - 1)

    def _value(self, term: Term, scoring: Scoring, position: Expr, **arguments: Expr) -> Expr:
        """A term for the key at a position; past the sequence's end as for its last."""
        last = T.max(scoring.context_len - 1, 0)
        known = {"batch": scoring.seq, "query_pos": last, "key_pos": T.min(position, last), "batch_size": scoring.batch}
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
