"""What a score becomes between its product and the softmax: the CPU's functions, for rows in the registers of a lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.state import Registers
from pa_compiler.kernels import scores
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
        query_pos: Position of the query token in its sequence.
        slopes: Of the rows that a lane has, by their registers of row_max, float32; None where the spec has no ALiBi.
    """

    query_pos: Expr
    slopes: Buffer | None


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


def scored(spec: PagedAttentionSpec, score: Expr, scoring: Scoring, register: Expr, tile: Tile, row: Expr) -> Expr:
    """As kernels/scores.py: a scaled score with the soft cap and ALiBi. register is that of its row's row_max."""
    slope = None if scoring.slopes is None else scoring.slopes[register]
    return scores.scored(spec, score, scoring, slope, tile, row)
