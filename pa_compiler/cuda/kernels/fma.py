"""The stages in float32 arithmetic: for float32, and for one to three heads, which leave tensor cores little to do.

`lanes` lanes of a warp share a token, each with some chunks of head_dim: of the query, of the keys and values it reads,
and of acc. The 32 / lanes teams of a warp take every such token of a tile, with a maximum and a sum of their own until
the end.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.kernels.ring import chunk_offset
from pa_compiler.cuda.kernels.strategy import LOG2_E, NEGATIVE_INFINITY, Strategy, exponent
from pa_compiler.cuda.tiling import CHUNK_WORDS, WARP, CudaTiling
from pa_compiler.kernels.headroom import scaled
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


def strategy(spec: PagedAttentionSpec, tiling: CudaTiling) -> Strategy:
    """The stages and the registers that they keep."""
    elements = spec.head_dim // tiling.lanes
    return Strategy(
        query=(tiling.row_tile * elements, "float32"),
        row_max=tiling.row_tile,
        row_sum=tiling.row_tile,
        acc=tiling.row_tile * elements,
        load_query=load_query(spec, tiling),
        attend=attend(spec, tiling),
        store_warp=store_warp(spec, tiling),
    )


def load_query(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """q[row, elements of this lane] as float32, times query_scale; rows past `rows` are 0."""
    width, lanes = tiling.chunk_elements(spec), tiling.lanes
    elements = spec.head_dim // lanes

    @inline
    def stage(query, query_offset, head_stride, rows, query_scale, lane, q):
        for r in T.unroll(tiling.row_tile):
            for i in T.unroll(elements):
                q[r * elements + i] = T.float32(0)
            if r < rows:
                for i in T.unroll(elements):
                    d = T.meta_var((i // width * lanes + T.truncmod(lane, lanes)) * width + i % width)
                    element = T.meta_var(query[query_offset + T.int64(r) * head_stride + T.Cast("int64", d)])
                    q[r * elements + i] = scaled(spec, T.Cast("float32", element), query_scale)

    return stage


def attend(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """A tile of the ring: scores, their softmax, and what it adds to acc. Tokens from valid_len on weigh nothing."""
    lanes, rows, width = tiling.lanes, tiling.row_tile, tiling.chunk_elements(spec)
    teams, levels = WARP // lanes, lanes.bit_length() - 1
    tokens, own_chunks = tiling.tile_tokens // teams, tiling.chunks(spec) // lanes
    elements = own_chunks * width

    @inline
    def stage(ring, keys, values, score_scale, headroom, valid_len, lane, q, row_max, row_sum, acc):
        words = T.alloc_buffer((CHUNK_WORDS,), "uint32", scope="local")
        scores = T.alloc_buffer((tokens * rows,), "float32", scope="local")
        for i in T.unroll(tokens * rows):
            scores[i] = T.float32(0)
        for t in T.unroll(tokens):
            for c in T.unroll(own_chunks):
                row = T.meta_var(t * teams + T.truncdiv(lane, lanes))
                place = T.meta_var(chunk_offset(spec, tiling, row, c * lanes + T.truncmod(lane, lanes)))
                T.ptx["ld.shared.v4.b32"](words[0], words[1], words[2], words[3], ring.ptr_to([keys + place]))
                for i in T.unroll(width):
                    key: T.float32 = _element(spec, words, i)
                    for r in T.unroll(rows):
                        scores[t * rows + r] = scores[t * rows + r] + key * q[r * elements + c * width + i]
        for r in T.unroll(rows):
            highest: T.float32 = row_max[r]
            for t in T.unroll(tokens):
                for level in T.unroll(levels):
                    scores[t * rows + r] = scores[t * rows + r] + T.cuda.__shfl_xor_sync(
                        T.uint32(ALL_LANES), scores[t * rows + r], 1 << level, WARP
                    )
                scores[t * rows + r] = T.Select(
                    t * teams + T.truncdiv(lane, lanes) < valid_len,
                    scores[t * rows + r] * score_scale,
                    T.float32(NEGATIVE_INFINITY),
                )
                highest = T.max(highest, scores[t * rows + r])
            shift: T.float32 = T.Select(highest == T.float32(NEGATIVE_INFINITY), T.float32(0), highest)
            alpha: T.float32 = T.float32(0)
            T.ptx["ex2.approx.ftz.f32"](alpha, (row_max[r] - shift) * T.float32(LOG2_E))
            row_max[r] = highest
            row_sum[r] = row_sum[r] * alpha
            for i in T.unroll(elements):
                acc[r * elements + i] = acc[r * elements + i] * alpha
            for t in T.unroll(tokens):
                T.ptx["ex2.approx.ftz.f32"](
                    scores[t * rows + r], exponent(spec, scores[t * rows + r] - shift, headroom)
                )
                row_sum[r] = row_sum[r] + scores[t * rows + r]
        for t in T.unroll(tokens):
            for c in T.unroll(own_chunks):
                row = T.meta_var(t * teams + T.truncdiv(lane, lanes))
                place = T.meta_var(chunk_offset(spec, tiling, row, c * lanes + T.truncmod(lane, lanes)))
                T.ptx["ld.shared.v4.b32"](words[0], words[1], words[2], words[3], ring.ptr_to([values + place]))
                for i in T.unroll(width):
                    value: T.float32 = _element(spec, words, i)
                    for r in T.unroll(rows):
                        a = T.meta_var(r * elements + c * width + i)
                        acc[a] = acc[a] + scores[t * rows + r] * value

    return stage


def store_warp(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """The teams of a warp as one, to the warp's place in shared memory."""
    width, lanes = tiling.chunk_elements(spec), tiling.lanes
    elements, pitch = spec.head_dim // lanes, tiling.acc_pitch(spec)
    levels = (WARP // lanes).bit_length() - 1

    @inline
    def stage(row_max, row_sum, acc, warp, lane, warp_max, warp_sum, warp_acc):
        for r in T.unroll(tiling.row_tile):
            highest: T.float32 = row_max[r]
            for level in T.unroll(levels):
                highest = T.max(highest, T.cuda.__shfl_xor_sync(T.uint32(ALL_LANES), highest, lanes << level, WARP))
            shift: T.float32 = T.Select(highest == T.float32(NEGATIVE_INFINITY), T.float32(0), highest)
            weight: T.float32 = T.float32(0)
            T.ptx["ex2.approx.ftz.f32"](weight, (row_max[r] - shift) * T.float32(LOG2_E))
            total: T.float32 = row_sum[r] * weight
            for level in T.unroll(levels):
                total = total + T.cuda.__shfl_xor_sync(T.uint32(ALL_LANES), total, lanes << level, WARP)
            for i in T.unroll(elements):
                value: T.float32 = acc[r * elements + i] * weight
                for level in T.unroll(levels):
                    value = value + T.cuda.__shfl_xor_sync(T.uint32(ALL_LANES), value, lanes << level, WARP)
                if lane < lanes:
                    d = T.meta_var((i // width * lanes + lane) * width + i % width)
                    warp_acc[(warp * tiling.row_tile + r) * pitch + d] = value
            if lane == 0:
                warp_max[warp * tiling.row_tile + r] = highest
                warp_sum[warp * tiling.row_tile + r] = total

    return stage


def _element(spec: PagedAttentionSpec, words: Expr, i: Expr) -> Expr:
    """Element i of a chunk as float32."""
    if spec.dtype == "float32":
        return T.cuda.uint_as_float(words[i])
    word = words[i // 2]
    odd = i % 2 == 1
    if spec.dtype == "bfloat16":
        return T.cuda.uint_as_float(
            T.Select(odd, T.bitwise_and(word, T.uint32(0xFFFF0000)), T.shift_left(word, T.uint32(16)))
        )
    bits = T.shift_right(word, T.Select(odd, T.uint32(16), T.uint32(0)))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))
