"""What the two ways to compute a tile on CUDA, tensor cores and float32 arithmetic, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.spec import PagedAttentionSpec

NEGATIVE_INFINITY = float("-inf")

LOG2_E = 1.4426950216293335
"""log2(e) in float32: exp(x) is 2 ** (x * LOG2_E), and the GPU has an instruction for powers of 2."""


def exponent(spec: PagedAttentionSpec, below: Expr, headroom: Expr) -> Expr:
    """log2 of the weight of a score that is `below`, 0 or less, from the row's maximum: with headroom (headroom.py)."""
    return below * T.float32(LOG2_E) - headroom if spec.wide_range else below * T.float32(LOG2_E)


class Strategy(NamedTuple):
    """How one warp attends to its tiles: functions for the body of the kernel, and the registers of a lane they keep.

    Attributes:
        query: Count and type of the registers for the query.
        row_max: float32 registers for the maxima of rows.
        row_sum: float32 registers for the sums of rows.
        acc: float32 registers for the sums of values.
        load_query: (query, offset, head_stride, rows, query_scale, lane, query registers).
        attend: (ring, keys, values, score_scale, headroom, valid_len, lane, query registers, row_max, row_sum, acc).
            headroom is float32.
        store_warp: (row_max, row_sum, acc, warp, lane, warp_max, warp_sum, warp_acc): to shared memory, at the warp's
            place in [warps, row_tile] and [warps, row_tile, acc_pitch].
    """

    query: tuple[int, str]
    row_max: int
    row_sum: int
    acc: int
    load_query: Callable[..., None]
    attend: Callable[..., None]
    store_warp: Callable[..., None]
