"""What a score becomes between qk_matmul and the softmax: soft cap and bias, in the order that a spec's fields have."""

from __future__ import annotations

from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.kernels.functions import tanh
from pa_compiler.kernels.rows import Rows
from pa_compiler.kernels.tokens import Tile
from pa_compiler.spec import PagedAttentionSpec


class Scoring(NamedTuple):
    """What scores depend on besides queries and keys.

    Attributes:
        rows: The rows of the head tile.
        query_pos: Position of their query token in its sequence.
        slopes: alibi_slopes, float32 [num_heads]; None where the spec has none.
    """

    rows: Rows
    query_pos: Expr
    slopes: Any


def slope_of(scoring: Scoring, row: Expr) -> Expr:
    """The slope of a row; 0 of a row that pads the tile."""
    return T.if_then_else(row < scoring.rows.num, scoring.slopes[scoring.rows.at(row)[1]], T.float32(0))


def scored(spec: PagedAttentionSpec, score: Expr, scoring: Scoring, slope: Expr, tile: Tile, column: Expr) -> Expr:
    """A scaled score with the soft cap, and with the bias of the distance of its key.

    slope is slope_of its row; column is the key's in its tile.
    """
    if spec.softcap is not None:
        score = T.float32(spec.softcap) * tanh(score * T.float32(1 / spec.softcap))
    if spec.alibi:
        score = score + slope * T.Cast("float32", tile.position(column) - scoring.query_pos)
    return score
