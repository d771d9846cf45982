"""What the two ways to compute a tile on CUDA, tensor cores and float32 arithmetic, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.state import Registers
from pa_compiler.kernels.rows import AnyRows


class Strategy(NamedTuple):
    """How one warp attends to its tiles: functions for the body of the kernel, and the registers of a lane they keep.

    Attributes:
        query: Count and type of the registers for the query.
        registers: Of the states of rows.
        load_query: (query, token_stride, head_stride, rows, query_scale, lane, query registers).
        attend: (ring, keys, score_scale, headroom, tile, scoring, lane, query registers, state). keys: the word of the
            ring where a tile begins. headroom is float32. tile and scoring are of scores.py.
        store_warp: (state, warp, lane, results): to shared memory, at the warp's place in results (join.py).
    """

    query: tuple[int, str]
    registers: Registers
    load_query: Callable[..., None]
    attend: Callable[..., None]
    store_warp: Callable[..., None]


def place(rows: AnyRows, row: Expr, token_stride: Expr, head_stride: Expr) -> Expr:
    """Elements from the beginning of query, out or lse to a row's part of it, int64."""
    token, head = rows.at(row)
    return T.Cast("int64", token) * token_stride + T.Cast("int64", head) * head_stride
