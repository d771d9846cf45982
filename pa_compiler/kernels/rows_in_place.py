"""Stages 1 and 3 where a matrix unit multiplies rows of tokens as they lie in the cache, in NHD and HND.

TILE_TOKENS rows of keys are a left operand, whose right one is the query with its rows side by side: what comes out has
a row of scores for each token, and is turned. Rows of values are a right operand. A word of theirs has two elements of
one token, and a product adds up both, so that each weight has two words: one of the weight and 0, which gives the sums
of the even elements, and one of 0 and the weight, which gives those of the odd ones. It multiplies twice as much as
pairs of tokens would, and no value has to be moved.

An infinity or a NaN among the values comes out as NaN for its neighbour too, which it is multiplied by 0 for. So where
sums are not finite they are made again, element by element. Token groups at the ends of what is seen are copied, with 0
for what is not seen.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels import state
from pa_compiler.kernels.caches import rows_from, value_access, whole
from pa_compiler.kernels.elements import INFINITE, LOW, dot_pairs, half
from pa_compiler.kernels.infinite import find_any
from pa_compiler.kernels.row_sums import add_up, weight_rows
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import TILE_ROWS, TILE_TOKENS, Tiling
from pa_compiler.tvmscript import inline


def stages(spec: PagedAttentionSpec, tiling: Tiling) -> tuple[Callable[..., None], ...]:
    """What there is in place of qk_matmul, pair_probs and pv_update."""
    return qk_matmul(spec, tiling), split_probs(tiling), pv_update(spec, tiling)


def pairs_shape(tiling: Tiling, num_tiles: int) -> tuple[int, int, int]:
    """The shape of the words of weights of so many head tiles: of split_probs, in whole tiles, or of pair_probs."""
    if not tiling.rows_in_place:
        return num_tiles, tiling.row_tile, tiling.padded_kv_tile // tiling.values.terms
    return num_tiles, weight_rows(tiling), tiling.padded_kv_tile


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """What kernels/qk_matmul.py has, with the query turned: q_tile[first, d, r].

    Of the columns of q_tile beyond row_tile nothing is used.
    """
    rows, depth, tokens = tiling.row_tile, spec.head_dim // 2, tiling.padded_kv_tile
    steps, num_tiles, group_tiles = tiling.token_group // TILE_TOKENS, tiling.pass_tiles(spec), tiling.row_tiles(spec)

    @inline
    def stage(q_tile, first, keys, head_offset, tile, scores, slot):
        with T.sblock("qk_matmul"):
            T.reads(q_tile[first : first + num_tiles, 0:depth, 0:TILE_ROWS], whole(keys.memory), whole(keys.offsets))
            T.writes(scores[slot : slot + num_tiles, 0:rows, 0:tokens])
            by_token = T.sblock_alloc_buffer((num_tiles, tokens, TILE_ROWS), "float32")
            for to, i, s, t, r, d in T.grid(tile.num_groups, num_tiles, steps, TILE_TOKENS, TILE_ROWS, depth):
                with T.sblock("scores"):
                    vs = T.axis.spatial(tokens // TILE_TOKENS, to * steps + s)
                    vi, vt, vr, vd = T.axis.remap("SSSR", [i, t, r, d])
                    now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * keys.head)
                    with T.init():
                        by_token[vi, vs * TILE_TOKENS + vt, vr] = T.float32(0)
                    by_token[vi, vs * TILE_TOKENS + vt, vr] += dot_pairs(
                        rows_from(keys, vs * TILE_TOKENS, vt, now, vd), q_tile[first + vi, vd, vr]
                    )
            for to, i, s, t, r in T.grid(tile.num_groups, num_tiles, steps, TILE_TOKENS, rows):
                with T.sblock("turned_scores"):
                    vs = T.axis.spatial(tokens // TILE_TOKENS, to * steps + s)
                    vi, vt, vr = T.axis.remap("SSS", [i, t, r])
                    scores[slot + vi, vr, vs * TILE_TOKENS + vt] = by_token[vi, vs * TILE_TOKENS + vt, vr]

    return stage


def split_probs(tiling: Tiling) -> Callable[..., None]:
    """words[slot, 2r, t] = the word of probs[slot, r, t] and 0, words[slot, 2r + 1, t] = that of 0 and it.

    For num_groups token groups; probs are numbers of bfloat16, as float32. Of other rows nothing is written.
    """
    rows, num_rows, group, tokens = tiling.row_tile, weight_rows(tiling), tiling.token_group, tiling.padded_kv_tile

    @inline
    def stage(probs, words, tile_sum, slot, num_groups, units=None, lost=None):
        with T.sblock("split_probs"):
            T.reads(probs[slot, 0:rows, 0:tokens])
            T.writes(words[slot, 0:num_rows, 0:tokens])
            for r, to, ti in T.grid(rows, num_groups, group):
                with T.sblock("even_weight"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    bits = T.meta_var(T.reinterpret("int32", probs[slot, vr, vt]))
                    words[slot, vr * 2, vt] = T.bitwise_and(T.shift_right(bits, 16), LOW)
            for r, to, ti in T.grid(rows, num_groups, group):
                with T.sblock("odd_weight"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    words[slot, vr * 2 + 1, vt] = T.reinterpret("int32", probs[slot, vr, vt])

    return stage


def pv_update(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The sblock pv_update: the outputs of the head tiles, whose weights are split_probs' words, and their fold."""
    num_tiles, rows, dim, num_rows = tiling.pass_tiles(spec), tiling.row_tile, spec.result_dim, weight_rows(tiling)
    sum_stage, element_stage = add_up(spec, tiling), _by_element(spec, tiling)
    find_infinite, fold_stage = _find_infinite(spec, tiling), state.fold(num_tiles, rows, dim)

    @inline
    def stage(weights, values, head_offset, tile, factors, running, step, num_steps, computed):
        with T.sblock("pv_update"):
            T.reads()
            T.writes()
            acc = T.sblock_alloc_buffer((num_tiles, num_rows, dim // 2), "float32")
            sum_stage(weights, values, head_offset, tile, acc)
            for i in range(num_tiles):
                with T.sblock("finite_sums"):
                    vi = T.axis.spatial(num_tiles, i)
                    T.reads()
                    T.writes()
                    infinite = T.sblock_alloc_buffer((1,), "int32")
                    find_infinite(acc, vi, infinite)
                    if infinite[0] != 0:
                        element_stage(weights, values, head_offset, tile, acc, vi)
            with T.sblock("fold"):
                T.reads(
                    acc[0:num_tiles, 0:num_rows, 0 : dim // 2],
                    factors.running[0:num_tiles, 0:rows],
                    factors.added[0:num_tiles, 0:rows],
                )
                T.writes(running.acc[running.slot : running.slot + num_tiles, 0:rows, 0:dim])
                tile_acc = T.sblock_alloc_buffer((num_tiles, rows, dim), "float32")
                for i, r, p, w in T.grid(num_tiles, rows, 2, dim // 2):
                    with T.sblock("in_order"):
                        vi, vr, vp, vw = T.axis.remap("SSSS", [i, r, p, w])
                        tile_acc[vi, vr, vw * 2 + vp] = acc[vi, vr * 2 + vp, vw]
                fold_stage(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage


def _find_infinite(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """infinite[0] = 1 where the sums of a row of head tile i have an infinity or a NaN, else 0."""
    rows, vectors = 2 * tiling.row_tile, spec.result_dim // 2 // TILE_ROWS
    any_infinite = find_any(TILE_ROWS)

    @inline
    def stage(acc, i, infinite):
        with T.sblock("find_infinite"):
            T.reads(acc[i, 0:rows, 0 : vectors * TILE_ROWS])
            T.writes(infinite[0:1])
            largest = T.sblock_alloc_buffer((TILE_ROWS,), "int32")
            for lane, m, w in T.grid(TILE_ROWS, rows, vectors):
                with T.sblock("largest"):
                    vlane = T.axis.spatial(TILE_ROWS, lane)
                    vm, vw = T.axis.remap("RR", [m, w])
                    with T.init():
                        largest[vlane] = 0
                    number = T.meta_var(T.reinterpret("int32", acc[i, vm, vw * TILE_ROWS + vlane]))
                    largest[vlane] = T.max(largest[vlane], T.bitwise_and(number, INFINITE))
            any_infinite(largest, infinite)

    return stage


def _by_element(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """acc[i, 2r + p, w] = the sum of the weights of row r times element p of word w of what is seen."""
    rows, words, tokens, group_tiles = (
        tiling.row_tile,
        spec.result_dim // 2,
        tiling.padded_kv_tile,
        tiling.row_tiles(spec),
    )
    read = value_access(spec, tiling).pair

    def first_column(tile):
        return T.int32(0) if tile.first_seen is None else T.max(tile.first_seen - tile.start, 0)

    @inline
    def stage(weights, values, head_offset, tile, acc, i):
        begin: T.let = first_column(tile)
        now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(i, group_tiles)) * values.head)
        with T.sblock("element_sums"):
            T.reads()
            T.writes()
            element_acc = T.sblock_alloc_buffer((rows, 2, words), "float32")
            for r, p, t, w in T.grid(rows, 2, tile.valid_len - begin, words):
                with T.sblock("element_sum"):
                    vr, vp, vw = T.axis.remap("SSS", [r, p, w])
                    vt = T.axis.reduce(tokens, begin + t)
                    with T.init():
                        element_acc[vr, vp, vw] = T.float32(0)
                    weight = T.meta_var(T.reinterpret("float32", weights[i, vr * 2 + 1, vt]))
                    element_acc[vr, vp, vw] += weight * half(read(values, vt, now, vw), vp)
            for r, p, w in T.grid(rows, 2, words):
                with T.sblock("stored_element"):
                    vr, vp, vw = T.axis.remap("SSS", [r, p, w])
                    acc[i, vr * 2 + vp, vw] = element_acc[vr, vp, vw]

    return stage
