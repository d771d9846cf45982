"""The stages on tensor cores, with the operands of attention swapped: tokens are rows of the scores, heads columns.

mma.m16n8k16 then takes a group of up to 8 heads without padding it to 16 rows: scores^T [16 tokens, 8 heads] =
keys [16, head_dim] x query^T, and acc^T [value_dim, 8 heads] = values^T x probs^T. Groups of 9 to 16 heads are two
tiles of heads. With g = lane / 4 and c = lane % 4, a lane holds the scores of tokens g and g + 8 for the heads 2c and
2c + 1, and of acc^T the elements g and g + 8 of every 16 for the same heads, so that a head's maximum and its factors
are where its scores and its sums are. (PTX ISA, matrix fragments for mma.m16n8k16.)

The sum of a row is a product with a row of ones: the denominator adds up the rounded probabilities that the numerator
is made of. Where tokens have scales, the numerator is made of others, and each lane adds up those of its tokens.

A product multiplies each value for all rows. Where some rows do not see it, and it is no finite number, 0 is multiplied
in its place, and who sees it is found by a product of its own (isolate.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.fragments import fragments
from pa_compiler.cuda.kernels.isolate import isolate
from pa_compiler.cuda.kernels.scales import load_scales, weighted
from pa_compiler.cuda.kernels.scores import Functions
from pa_compiler.cuda.kernels.state import (
    EXP2,
    NEGATIVE_INFINITY,
    Registers,
    Row,
    exponent,
    over_lanes,
    rescale,
    shift_of,
)
from pa_compiler.cuda.kernels.strategy import Strategy, place
from pa_compiler.cuda.tiles import MMA_HEADS, MMA_TOKENS, TensorCoreTiling
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

_PTX = {"bfloat16": "bf16", "float16": "f16"}
_ONES = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}


def strategy(spec: PagedAttentionSpec, tiling: TensorCoreTiling, functions: Functions) -> Strategy:
    """The stages and the registers that they keep."""
    return Strategy(
        query=(tiling.mma_tiles * spec.head_dim // 16 * 2, "uint32"),
        registers=registers(spec, tiling),
        load_query=load_query(spec, tiling),
        attend=attend(spec, tiling, functions),
        store_warp=store_warp(spec, tiling),
    )


def registers(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Registers:
    """row_max[tile, h] of the heads 2c + h, and the products row_sum[tile, 4] and acc[tile, k, 4] as mma leaves them.

    A row is (tile, h). Of row_sum's four, two are 0: of rows of the product that the ones do not fill. Where tokens
    have scales, row_sum is of this lane's tokens.
    """
    tiles, depth = tiling.mma_tiles, spec.result_dim // 16

    def element_of(row: Row, i: Expr) -> Expr:
        return (row[0] * depth + i // 2) * 4 + i % 2 * 2 + row[1]

    def row_of(i: Expr, lane: Expr) -> Expr:
        return i // 2 * MMA_HEADS + T.truncmod(lane, 4) * 2 + i % 2

    return Registers(
        rows=tiles * 2,
        sums=tiles * 4,
        elements=depth * 2,
        row_of=row_of,
        max_of=lambda row: row[0] * 2 + row[1],
        sum_of=lambda row: row[0] * 4 + row[1],
        element_of=element_of,
    )


def load_query(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Callable[..., None]:
    """q_frag[tile, k, 2] = the rows of a tile as the second operands of QK; those that pad it are 0.

    Times query_scale, as in headroom.scaled, but for float16 (scales.late).
    """
    depth, query_element = spec.head_dim // 16, fragments(spec, tiling).query_element

    @inline
    def stage(query, token_stride, head_stride, rows, query_scale, lane, q_frag):
        for i in T.unroll(tiling.mma_tiles * depth * 2):
            q_frag[i] = T.uint32(0)
        for n in T.unroll(tiling.mma_tiles):
            row: T.let = n * MMA_HEADS + T.truncdiv(lane, 4)
            if row < rows.num:
                start: T.int64 = place(rows, row, token_stride, head_stride)
                for k in T.unroll(depth):
                    for half in T.unroll(2):
                        T.ptx["ld.global.nc.b32"](
                            q_frag[(n * depth + k) * 2 + half],
                            query.ptr_to([start + T.Cast("int64", query_element(k, half, lane))]),
                        )
        if spec.dtype == "bfloat16":  # once all loads are on their way
            for i in T.unroll(tiling.mma_tiles * depth * 2):
                word: T.uint32 = q_frag[i]
                T.ptx["cvt.rn.bf16x2.f32"](
                    q_frag[i],
                    T.cuda.uint_as_float(T.bitwise_and(word, T.uint32(0xFFFF0000))) * query_scale,
                    T.cuda.uint_as_float(T.shift_left(word, T.uint32(16))) * query_scale,
                )

    return stage


def attend(spec: PagedAttentionSpec, tiling: TensorCoreTiling, functions: Functions) -> Callable[..., None]:
    """A tile of the ring: scores, their softmax, and what it adds to acc. Tokens past its end weigh nothing."""
    operands = tiling.tile_tokens // MMA_TOKENS * tiling.mma_tiles
    values_at, scales_at = tiling.values_at(spec), tiling.scales_at(spec)
    qk_stage, softmax_stage = qk_matmul(spec, tiling), softmax(spec, tiling, functions)
    pv_stage = pv_matmul(spec, tiling, functions.by_row)

    @inline
    def stage(ring, keys, score_scale, headroom, tile, scoring, lane, q_frag, state):
        scores = T.alloc_buffer((operands * 4,), "float32", scope="local")
        p_frag = T.alloc_buffer((operands * 2,), "uint32", scope="local")
        qk_stage(ring, keys, q_frag, lane, scores)
        softmax_stage(ring, keys + scales_at, scores, score_scale, headroom, tile, scoring, lane, state, p_frag)
        whole = T.meta_var(functions.all_see(scoring, tile.start, tiling.tile_tokens))
        pv_stage(ring, keys + values_at, p_frag, lane, whole, state)

    return stage


def qk_matmul(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Callable[..., None]:
    """scores[m, tile, 4] = key . query of a tile of the ring, not scaled."""
    depth, tiles, load_keys = spec.head_dim // 16, tiling.mma_tiles, fragments(spec, tiling).load_keys
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{_PTX[spec.dtype]}.{_PTX[spec.dtype]}.f32"

    @inline
    def stage(ring, keys, q_frag, lane, scores):
        k_frag = T.alloc_buffer((4,), "uint32", scope="local")
        for i in T.unroll(tiling.tile_tokens // MMA_TOKENS * tiles * 4):
            scores[i] = T.float32(0)
        for m in T.unroll(tiling.tile_tokens // MMA_TOKENS):
            for k in T.unroll(depth):
                load_keys(ring, keys, m * MMA_TOKENS, k, lane, k_frag)
                for n in T.unroll(tiles):
                    s = T.meta_var((m * tiles + n) * 4)
                    q = T.meta_var((n * depth + k) * 2)
                    T.ptx[mma](
                        scores[s], scores[s + 1], scores[s + 2], scores[s + 3],
                        k_frag[0], k_frag[1], k_frag[2], k_frag[3], q_frag[q], q_frag[q + 1],
                        scores[s], scores[s + 1], scores[s + 2], scores[s + 3],
                    )  # fmt: skip

    return stage


def softmax(spec: PagedAttentionSpec, tiling: TensorCoreTiling, functions: Functions) -> Callable[..., None]:
    """scores -> p_frag[m, tile, 2], the probabilities as second operands of PV; the state is rescaled for them.

    A score is scored in the register of its product. Tokens past the end of the tile weigh nothing. Where tokens have
    scales, these lie in the ring from word scales_at on.
    """
    tiles, blocks = tiling.mma_tiles, tiling.tile_tokens // MMA_TOKENS
    max_of_tokens, rescale_stage = over_lanes(T.max, first=4), rescale(registers(spec, tiling))
    row_of = registers(spec, tiling).row_of
    load_scales_stage = load_scales(blocks * 2, lambda i, lane: i * 8 + T.truncdiv(lane, 4))
    pack = f"cvt.rn.{_PTX[spec.dtype]}x2.f32"

    @inline
    def stage(ring, scales_at, scores, score_scale, headroom, tile, scoring, lane, state, p_frag):
        shift = T.alloc_buffer((2,), "float32", scope="local")
        pair = T.alloc_buffer((2,), "uint32", scope="local")
        if spec.token_scales:
            scales = T.alloc_buffer((blocks * 2,), "float32", scope="local")
            load_scales_stage(ring, scales_at, lane, scales)
        for m in T.unroll(blocks):
            for n in T.unroll(tiles):
                for i in T.unroll(4):
                    token = T.meta_var(m * MMA_TOKENS + i // 2 * 8 + T.truncdiv(lane, 4))
                    s = T.meta_var((m * tiles + n) * 4 + i)
                    register = T.meta_var(n * 2 + i % 2)
                    row = T.meta_var(row_of(register, lane))
                    factor = T.meta_var(score_scale * scales[m * 2 + i // 2] if spec.token_scales else score_scale)
                    score = T.meta_var(functions.scored(scores[s] * factor, scoring, register, row, tile, token))
                    scores[s] = T.Select(
                        functions.sees(scoring, register, row, tile, token), score, T.float32(NEGATIVE_INFINITY)
                    )
        if functions.in_tree(scoring, tile.start, tiling.tile_tokens):
            for i in T.unroll(blocks * tiles * 4):
                token = T.meta_var(i // (tiles * 4) * MMA_TOKENS + i % 4 // 2 * 8 + T.truncdiv(lane, 4))
                if functions.hidden(scoring, i // 4 % tiles * 2 + i % 2, tile, token):
                    scores[i] = T.float32(NEGATIVE_INFINITY)
        if spec.token_scales:  # those of values
            load_scales_stage(ring, scales_at + tiling.tile_tokens, lane, scales)
        for n in T.unroll(tiles):
            for h in T.unroll(2):
                highest: T.float32 = state.row_max[n * 2 + h]
                for m in T.unroll(blocks):
                    for i in T.unroll(2):
                        highest = T.max(highest, scores[(m * tiles + n) * 4 + 2 * i + h])
                max_of_tokens(highest)
                shift[h] = shift_of(highest)
                rescale_stage(state, (n, h), highest, shift[h])
            for m in T.unroll(blocks):
                for i in T.unroll(4):
                    s = T.meta_var((m * tiles + n) * 4 + i)
                    T.ptx[EXP2](scores[s], exponent(spec, scores[s] - shift[i % 2], headroom))
                    if spec.token_scales:
                        sum_at = T.meta_var(n * 4 + i % 2)
                        state.row_sum[sum_at] = state.row_sum[sum_at] + scores[s]
                        scores[s] = weighted(scores[s], scales[m * 2 + i // 2])
                for i in T.unroll(2):  # [token, head] -> [head, token], as the second operand has it
                    s = T.meta_var((m * tiles + n) * 4 + 2 * i)
                    T.ptx[pack](pair[i], scores[s + 1], scores[s])
                    T.ptx["movmatrix.sync.aligned.m8n8.trans.b16"](p_frag[(m * tiles + n) * 2 + i], pair[i])

    return stage


def pv_matmul(spec: PagedAttentionSpec, tiling: TensorCoreTiling, by_row: bool) -> Callable[..., None]:
    """acc[tile, k, 4] += values^T x probs^T of a tile of the ring, and row_sum[tile, 4] += the sums of probs.

    by_row says whether rows may see different keys; then `whole`, whether all of them see all of the tile.
    """
    depth, tiles, load_values = spec.result_dim // 16, tiling.mma_tiles, fragments(spec, tiling).load_values
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{_PTX[spec.dtype]}.{_PTX[spec.dtype]}.f32"
    one, zero = T.uint32(_ONES[spec.dtype]), T.uint32(0)
    isolate_stage = isolate(spec, tiling, mma)

    def isolates(whole: Expr | bool) -> Expr | bool:
        return T.Not(whole) if by_row and spec.cache_dtype != "int8" else False  # which is finite

    @inline
    def stage(ring, values, p_frag, lane, whole, state):
        row_sum = T.meta_var(state.row_sum)
        acc = T.meta_var(state.acc)
        v_frag = T.alloc_buffer((4,), "uint32", scope="local")
        for m in T.unroll(tiling.tile_tokens // MMA_TOKENS):
            for n in T.unroll(0 if spec.token_scales else tiles):
                p = T.meta_var((m * tiles + n) * 2)
                T.ptx[mma](
                    row_sum[n * 4], row_sum[n * 4 + 1], row_sum[n * 4 + 2], row_sum[n * 4 + 3],
                    one, zero, one, zero, p_frag[p], p_frag[p + 1],
                    row_sum[n * 4], row_sum[n * 4 + 1], row_sum[n * 4 + 2], row_sum[n * 4 + 3],
                )  # fmt: skip
            for k in T.unroll(depth):
                load_values(ring, values, m * MMA_TOKENS, k, lane, v_frag)
                if isolates(whole):
                    isolate_stage(v_frag, p_frag, m * tiles * 2, k, state)
                for n in T.unroll(tiles):
                    a = T.meta_var((n * depth + k) * 4)
                    p = T.meta_var((m * tiles + n) * 2)
                    T.ptx[mma](
                        acc[a], acc[a + 1], acc[a + 2], acc[a + 3],
                        v_frag[0], v_frag[1], v_frag[2], v_frag[3], p_frag[p], p_frag[p + 1],
                        acc[a], acc[a + 1], acc[a + 2], acc[a + 3],
                    )  # fmt: skip

    return stage


def store_warp(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Callable[..., None]:
    """A warp's state to shared memory, at its place in results."""
    depth, pitch, value_element = spec.result_dim // 16, tiling.acc_pitch(spec), fragments(spec, tiling).value_element
    sum_of_tokens = over_lanes(operator.add, first=4)

    @inline
    def stage(state, warp, lane, results):
        for n in T.unroll(tiling.mma_tiles):
            for h in T.unroll(2):
                row: T.let = n * MMA_HEADS + T.truncmod(lane, 4) * 2 + h
                if spec.token_scales:
                    total: T.float32 = state.row_sum[n * 4 + h]
                    sum_of_tokens(total)
                    state.row_sum[n * 4 + h] = total
                if row < tiling.row_tile:
                    if lane < 4:
                        results.row_max[warp * tiling.row_tile + row] = state.row_max[n * 2 + h]
                        results.row_sum[warp * tiling.row_tile + row] = state.row_sum[n * 4 + h]
                    for k in T.unroll(depth):
                        for i in T.unroll(2):
                            d = T.meta_var(value_element(k, i, lane))
                            element = T.meta_var(state.acc[(n * depth + k) * 4 + 2 * i + h])
                            results.acc[(warp * tiling.row_tile + row) * pitch + d] = element

    return stage
