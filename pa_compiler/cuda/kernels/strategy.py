"""What the two ways to compute a tile on CUDA, tensor cores and float32 arithmetic, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pa_compiler.cuda.kernels.state import Registers


class Strategy(NamedTuple):
    """How one warp attends to its tiles: functions for the body of the kernel, and the registers of a lane they keep.

    Attributes:
        query: Count and type of the registers for the query.
        registers: Of the states of rows.
        load_query: (query, offset, head_stride, rows, query_scale, lane, query registers).
        attend: (ring, keys, score_scale, headroom, tile, scoring, lane, query registers, state). keys: the word of the
            ring where a tile begins. headroom is float32. tile and scoring are of scores.py.
        store_warp: (state, warp, lane, results): to shared memory, at the warp's place in results (join.py).
    """

    query: tuple[int, str]
    registers: Registers
    load_query: Callable[..., None]
    attend: Callable[..., None]
    store_warp: Callable[..., None]
