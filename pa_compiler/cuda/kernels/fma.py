"""The stages in float32 arithmetic: for float32, and for one to three heads, which leave tensor cores little to do.

`lanes` lanes of a warp share a token, each with some chunks of head_dim: of the query, of the keys and values it reads,
and of acc. The 32 / lanes teams of a warp take every such token of a tile, with a maximum and a sum of their own until
the end.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.elements import numbers_of_words
from pa_compiler.cuda.kernels.scales import load_scales, weighted
from pa_compiler.cuda.kernels.scores import Functions
from pa_compiler.cuda.kernels.state import (
    EXP2,
    NEGATIVE_INFINITY,
    Registers,
    exchange,
    exponent,
    merge_lanes,
    rescale,
    shift_of,
)
from pa_compiler.cuda.kernels.strategy import Strategy, place
from pa_compiler.cuda.tiles import CHUNK_WORDS, WARP, FmaTiling, RingRows
from pa_compiler.kernels.headroom import scaled
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

_LOAD = {1: "ld.shared.b32", 2: "ld.shared.v2.b32", 4: "ld.shared.v4.b32"}


def strategy(spec: PagedAttentionSpec, tiling: FmaTiling, functions: Functions) -> Strategy:
    """The stages and the registers that they keep."""
    return Strategy(
        query=(tiling.row_tile * spec.head_dim // tiling.lanes, "float32"),
        registers=registers(spec, tiling),
        load_query=load_query(spec, tiling),
        attend=attend(spec, tiling, functions),
        store_warp=store_warp(spec, tiling),
    )


def registers(spec: PagedAttentionSpec, tiling: FmaTiling) -> Registers:
    """row_max[row], row_sum[row] and acc[row, elements of this lane], of the tokens of this lane's team."""
    rows, elements = tiling.row_tile, spec.result_dim // tiling.lanes
    return Registers(
        rows=rows,
        sums=rows,
        elements=elements,
        row_of=lambda i, lane: i,
        max_of=lambda row: row,
        sum_of=lambda row: row,
        element_of=lambda row, i: row * elements + i,
    )


def load_query(spec: PagedAttentionSpec, tiling: FmaTiling) -> Callable[..., None]:
    """q[row, elements of this lane] as float32, times query_scale; rows that pad the tile are 0."""
    width, lanes = tiling.piece_elements, tiling.lanes
    elements = spec.head_dim // lanes

    @inline
    def stage(query, token_stride, head_stride, rows, query_scale, lane, q):
        for r in T.unroll(tiling.row_tile):
            for i in T.unroll(elements):
                q[r * elements + i] = T.float32(0)
            if r < rows.num:
                start: T.int64 = place(rows, r, token_stride, head_stride)
                for i in T.unroll(elements):
                    d = T.meta_var((i // width * lanes + T.truncmod(lane, lanes)) * width + i % width)
                    element = T.meta_var(query[start + T.Cast("int64", d)])
                    q[r * elements + i] = scaled(spec, T.Cast("float32", element), query_scale)

    return stage


def attend(spec: PagedAttentionSpec, tiling: FmaTiling, functions: Functions) -> Callable[..., None]:
    """A tile of the ring: scores, their softmax, and what it adds to acc. Tokens past its end weigh nothing."""
    scores_of_lane = tiling.tile_tokens * tiling.lanes // WARP * tiling.row_tile
    values_at, scales_at = tiling.values_at(spec), tiling.scales_at(spec)
    qk_stage, softmax_stage = qk_matmul(spec, tiling), softmax(spec, tiling, functions)
    pv_stage, rows = pv_matmul(spec, tiling), tiling.row_tile

    @inline
    def stage(ring, keys, score_scale, headroom, tile, scoring, lane, q, state):
        numbers = T.alloc_buffer((tiling.piece_elements,), "float32", scope="local")
        scores = T.alloc_buffer((scores_of_lane,), "float32", scope="local")
        if functions.by_row:
            seen = T.alloc_buffer((rows,), "uint32", scope="local")
        shown = T.meta_var(seen if functions.by_row else None)
        qk_stage(ring, keys, q, lane, numbers, scores)
        softmax_stage(ring, keys + scales_at, scores, score_scale, headroom, tile, scoring, lane, state, shown)
        pv_stage(ring, keys + values_at, scores, lane, numbers, state, shown)

    return stage


def row_of(tiling: FmaTiling, t: Expr, lane: Expr) -> Expr:
    """The row in the ring of token t of a lane's team."""
    return t * (WARP // tiling.lanes) + T.truncdiv(lane, tiling.lanes)


def load_piece(tiling: FmaTiling, rows: RingRows) -> Callable[..., None]:
    """numbers = the elements of a lane's piece c of token t of its team, in a tile of the ring."""
    unpack = numbers_of_words(tiling.element, tiling.piece_words)

    def load(words: Buffer, pointer: Expr) -> Expr:
        return T.ptx[_LOAD[tiling.piece_words]](*(words[i] for i in range(tiling.piece_words)), pointer)

    @inline
    def stage(ring, tile, t, c, lane, numbers):
        words = T.alloc_buffer((tiling.piece_words,), "uint32", scope="local")
        piece = T.meta_var(c * tiling.lanes + T.truncmod(lane, tiling.lanes))
        place = T.meta_var(row_of(tiling, t, lane) * (rows.pitch * CHUNK_WORDS) + piece * tiling.piece_words)
        load(words, ring.ptr_to([tile + place]))
        unpack(words, numbers)

    return stage


def qk_matmul(spec: PagedAttentionSpec, tiling: FmaTiling) -> Callable[..., None]:
    """scores[token of this lane's team, row] = this lane's part of key . query, not scaled."""
    lanes, rows, width = tiling.lanes, tiling.row_tile, tiling.piece_elements
    teams, elements = WARP // lanes, spec.head_dim // lanes
    load_stage = load_piece(tiling, tiling.key_rows(spec))

    @inline
    def stage(ring, keys, q, lane, numbers, scores):
        for i in T.unroll(tiling.tile_tokens // teams * rows):
            scores[i] = T.float32(0)
        for t in T.unroll(tiling.tile_tokens // teams):
            for c in T.unroll(elements // width):
                load_stage(ring, keys, t, c, lane, numbers)
                for i in T.unroll(width):
                    for r in T.unroll(rows):
                        scores[t * rows + r] = scores[t * rows + r] + numbers[i] * q[r * elements + c * width + i]

    return stage


def softmax(spec: PagedAttentionSpec, tiling: FmaTiling, functions: Functions) -> Callable[..., None]:
    """scores -> the weights of a team's tokens; the state is rescaled for them, and has them in row_sum.

    Where tokens have scales, these lie in the ring from word scales_at on, and weights become those times the values'.
    Where rows see different keys, bit t of shown[r], uint32, says whether row r sees token t of the team's.
    """
    rows, levels, tokens = tiling.row_tile, tiling.lanes.bit_length() - 1, tiling.tile_tokens * tiling.lanes // WARP
    rescale_stage = rescale(registers(spec, tiling))
    load_scales_stage = load_scales(
        2 * tokens, lambda t, lane: t // tokens * tiling.tile_tokens + row_of(tiling, t % tokens, lane)
    )

    @inline
    def stage(ring, scales_at, scores, score_scale, headroom, tile, scoring, lane, state, shown):
        if spec.token_scales:
            scales = T.alloc_buffer((2 * tokens,), "float32", scope="local")
            load_scales_stage(ring, scales_at, lane, scales)
        for r in T.unroll(rows):
            if functions.by_row:
                shown[r] = T.uint32(0)
            highest: T.float32 = state.row_max[r]
            for t in T.unroll(tokens):
                for level in T.unroll(levels):
                    scores[t * rows + r] = scores[t * rows + r] + exchange(scores[t * rows + r], 1 << level)
                token = T.meta_var(row_of(tiling, t, lane))
                factor = T.meta_var(score_scale * scales[t] if spec.token_scales else score_scale)
                score = T.meta_var(functions.scored(scores[t * rows + r] * factor, scoring, r, r, tile, token))
                if functions.by_row:
                    is_seen: T.bool = functions.sees(scoring, r, r, tile, token)
                    if functions.in_tree(scoring, tile.start, tiling.tile_tokens):
                        is_seen = T.And(is_seen, T.Not(functions.hidden(scoring, r, tile, token)))
                    shown[r] = T.bitwise_or(
                        shown[r], T.Select(is_seen, T.shift_left(T.uint32(1), T.Cast("uint32", t)), T.uint32(0))
                    )
                sees = T.meta_var(is_seen if functions.by_row else functions.sees(scoring, r, r, tile, token))
                scores[t * rows + r] = T.Select(sees, score, T.float32(NEGATIVE_INFINITY))
                highest = T.max(highest, scores[t * rows + r])
            shift: T.float32 = shift_of(highest)
            rescale_stage(state, r, highest, shift)
            for t in T.unroll(tokens):
                T.ptx[EXP2](scores[t * rows + r], exponent(spec, scores[t * rows + r] - shift, headroom))
                state.row_sum[r] = state.row_sum[r] + scores[t * rows + r]
                if spec.token_scales:
                    scores[t * rows + r] = weighted(scores[t * rows + r], scales[tokens + t])

    return stage


def pv_matmul(spec: PagedAttentionSpec, tiling: FmaTiling) -> Callable[..., None]:
    """acc[row, elements of this lane] += weight * value of this team's tokens; of a token that shown hides, 0."""
    lanes, rows, width = tiling.lanes, tiling.row_tile, tiling.piece_elements
    teams, elements = WARP // lanes, spec.result_dim // lanes
    load_stage = load_piece(tiling, tiling.value_rows(spec))

    @inline
    def stage(ring, values, scores, lane, numbers, state, shown):
        for t in T.unroll(tiling.tile_tokens // teams):
            for c in T.unroll(elements // width):
                load_stage(ring, values, t, c, lane, numbers)
                for i in T.unroll(width):
                    for r in T.unroll(rows):
                        a = T.meta_var(r * elements + c * width + i)
                        state.acc[a] = state.acc[a] + scores[t * rows + r] * _shown(numbers[i], shown, r, t)

    return stage


def store_warp(spec: PagedAttentionSpec, tiling: FmaTiling) -> Callable[..., None]:
    """The states of a warp's teams as one, to the warp's place in results."""
    width, lanes, rows = tiling.piece_elements, tiling.lanes, tiling.row_tile
    elements, pitch = spec.result_dim // lanes, tiling.acc_pitch(spec)
    merge_stage = merge_lanes(registers(spec, tiling), first=lanes)

    @inline
    def stage(state, warp, lane, results):
        for r in T.unroll(rows):
            merge_stage(state, r)
            for i in T.unroll(elements):
                if lane < lanes:
                    d = T.meta_var((i // width * lanes + lane) * width + i % width)
                    results.acc[(warp * rows + r) * pitch + d] = state.acc[r * elements + i]
            if lane == 0:
                results.row_max[warp * rows + r] = state.row_max[r]
                results.row_sum[warp * rows + r] = state.row_sum[r]

    return stage


def _shown(value: Expr, shown: Buffer | None, row: Expr, token: Expr) -> Expr:
    """A value, or 0 where its row does not see its token."""
    if shown is None:
        return value
    bit = T.bitwise_and(T.shift_right(shown[row], T.Cast("uint32", token)), T.uint32(1))
    return T.Select(bit != T.uint32(0), value, T.float32(0))
