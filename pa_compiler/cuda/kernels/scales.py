"""Scales of caches of codes on a GPU: what scores, weights and sums of values are multiplied by. No product knows them.

A key's scale multiplies its score. A value's multiplies its weight where each token has one, and then the denominator
adds up the weights as they were; where a head or a cache has one scale, it multiplies acc, once for a range. Scales of
tokens come with their codes through the ring, where those of tokens that are not copied are 0.

Tensor cores take weights in float16 where that is the spec's dtype. They have no room below for headroom, nor queries
for their part of the scale of scores (kernels/headroom.py); but float32 sums of codes have room for both. So both come
in with the scales of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.arrays import Cache
from pa_compiler.cuda.tiles import CudaTiling, TensorCoreTiling
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

COPY = "cp.async.ca.shared.global"


class Scales(NamedTuple):
    """The scales of both caches as the threads of one kv head see them; a row is a slot's, where it has one."""

    keys: Cache
    values: Cache


def scales_of(arrays: Sequence[Buffer], strides: Sequence[tuple[Expr, Expr, Expr]], kv_head: Expr) -> Scales | None:
    """Those of a kv head. arrays: Arrays.scales; strides: of each those of a block, a row and a head."""
    caches = (
        Cache(array, block, row, T.Cast("int64", kv_head) * head)
        for array, (block, row, head) in zip(arrays, strides, strict=False)
    )
    return Scales(*caches) if arrays else None


def late(spec: PagedAttentionSpec, tiling: CudaTiling) -> bool:
    """Whether headroom, and the queries' part of the scale, come in with the scales of a head."""
    return spec.has_scales and spec.dtype == "float16" and isinstance(tiling, TensorCoreTiling)


def score_factor(
    spec: PagedAttentionSpec, tiling: CudaTiling, scales: Scales, query_scale: Expr, score_scale: Expr
) -> Expr:
    """What all scores of a kv head are multiplied by."""
    if spec.token_scales:
        return score_scale
    of_head = scales.keys.memory[scales.keys.head]
    return of_head * query_scale * score_scale if late(spec, tiling) else score_scale * of_head


def weights_headroom(spec: PagedAttentionSpec, tiling: CudaTiling, headroom: Expr) -> Expr:
    """The headroom that weights have when values are multiplied by them, float32."""
    return T.float32(0) if late(spec, tiling) else T.Cast("float32", headroom)


def scale_sums(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """A row's row_sum and an element of its acc, variables, with the scale of the head, and headroom if it is late."""

    @inline
    def stage(scales, headroom, row_sum, element):
        factor: T.float32 = scales.values.memory[scales.values.head]
        if late(spec, tiling):
            room: T.float32 = T.cuda.uint_as_float(T.shift_left(T.Cast("uint32", 127 - headroom), T.uint32(23)))
            factor = factor * room
            row_sum = row_sum * room
        element = T.Select(row_sum == T.float32(0), element, element * factor)

    return stage


def copy_scales(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """Start to copy the scales of a lane's token, 4 bytes or none of each, to the ring, from word `at` on.

    The token is in a slot of block `number`; of copied says whether it is one whose scales are copied.
    """
    tokens, size = tiling.tile_tokens, 4

    @inline
    def copy(cache, number, slot, ring, to, copied):
        source: T.int64 = T.Cast("int64", number) * cache.block + T.Cast("int64", slot) * cache.row + cache.head
        copied_bytes = T.meta_var(T.Select(copied, T.uint32(size), T.uint32(0)))
        T.ptx[COPY](ring.ptr_to([to]), cache.memory.ptr_to([source]), size, copied_bytes)

    @inline
    def stage(scales, number, slot, ring, at, lane, copied):
        if lane < tokens:
            copy(scales.keys, number, slot, ring, at + lane, copied)
            copy(scales.values, number, slot, ring, at + tokens + lane, copied)

    return stage


def load_scales(count: int, token_of: Callable[[Expr, Expr], Expr]) -> Callable[..., None]:
    """scales[i] = the scale of a lane's i-th token, of those that lie in the ring from word `at` on.

    token_of: (i, lane) -> the token's row in its tile.
    """

    @inline
    def stage(ring, at, lane, scales):
        for i in T.unroll(count):
            T.ptx["ld.shared.f32"](scales[i], ring.ptr_to([at + token_of(i, lane)]))

    return stage


def weighted(weight: Expr, scale: Expr) -> Expr:
    """A weight times the scale of its value; 0 stays 0, whatever the scale of a token is that is not seen."""
    return T.Select(weight == T.float32(0), T.float32(0), weight * scale)
