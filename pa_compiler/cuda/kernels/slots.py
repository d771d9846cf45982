"""What append_kv reads and where it writes: rows of new tokens, and slots, but those that a later token has too."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.tiles import WARP
from pa_compiler.cuda.tiling import APPEND_THREADS, APPEND_TOKENS
from pa_compiler.tvmscript import inline

WARPS = APPEND_THREADS // WARP


class Moved(NamedTuple):
    """Rows of new keys, or values, and where they go; strides in elements, int64.

    Attributes:
        new: key or value.
        token, head: Its strides.
        cache: key_cache or value_cache.
        block, row, cache_head: Its strides.
        scale: key_scale or value_scale; None where the caches hold dtype.
        scale_block, scale_row, scale_head: Its strides, 0 where it has no such axis.
    """

    new: Buffer
    token: Expr
    head: Expr
    cache: Buffer
    block: Expr
    row: Expr
    cache_head: Expr
    scale: Buffer | None
    scale_block: Expr
    scale_row: Expr
    scale_head: Expr


def find_lost() -> Callable[..., None]:
    """again[warp, t] = whether the warp has seen a later token with the slot of token first + t."""

    @inline
    def stage(slot_mapping, first, num_tokens, warp, lane, thread, again):
        mine = T.alloc_buffer((APPEND_TOKENS,), "int64", scope="local")
        lost = T.alloc_buffer((APPEND_TOKENS,), "int32", scope="local")
        for t in T.unroll(APPEND_TOKENS):
            lost[t] = 0
            mine[t] = T.int64(-1)
            if first + t < num_tokens:
                mine[t] = slot_mapping[first + t]
        for step in range(T.truncdiv(num_tokens - first + (APPEND_THREADS - 1), APPEND_THREADS)):
            later: T.int32 = first + step * APPEND_THREADS + thread
            if later < num_tokens:
                taken: T.int64 = slot_mapping[later]
                for t in T.unroll(APPEND_TOKENS):
                    if (first + t < later) & (mine[t] == taken):
                        lost[t] = 1
        for t in T.unroll(APPEND_TOKENS):
            any_lane: T.int32 = T.cuda.any_sync(T.uint32(ALL_LANES), lost[t])
            if lane == 0:
                again[warp * APPEND_TOKENS + t] = any_lane

    return stage


@inline
def find_target(slot_mapping, first, local, num_tokens, again, target):
    """target, a variable of -1, becomes the slot of token first + local, if it is one that is written."""
    if (local < APPEND_TOKENS) & (first + local < num_tokens):
        target = slot_mapping[first + local]
        for w in T.unroll(WARPS):
            target = T.Select(again[w * APPEND_TOKENS + local] != 0, T.int64(-1), target)


@inline
def load_chunk(words, at, moved, token, head, d):
    """words[at : at + 4] = the 16 bytes from element d on of a token's head."""
    T.ptx["ld.global.nc.v4.b32"](
        words[at], words[at + 1], words[at + 2], words[at + 3],
        moved.new.ptr_to([token * moved.token + head * moved.head + d]),
    )  # fmt: skip
