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
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import TILE_ROWS, TILE_TOKENS, Tiling
from pa_compiler.tvmscript import inline


def stages(spec: PagedAttentionSpec, tiling: Tiling) -> tuple[Callable[..., None], ...]:
    """What there is in place of qk_matmul, pair_probs and pv_update."""
    return qk_matmul(spec, tiling), split_probs(tiling), pv_update(spec, tiling)


def pairs_shape(tiling: Tiling, num_tiles: int) -> tuple[int, int, int]:
    """The shape of the words of weights of so many head tiles: of split_probs, in whole tiles, or of pair_probs."""
    if not tiling.rows_in_place:
        return num_tiles, tiling.row_tile, tiling.padded_kv_tile // 2
    return num_tiles, _weight_rows(tiling), tiling.padded_kv_tile


def _weight_rows(tiling: Tiling) -> int:
    return -(-2 * tiling.row_tile // TILE_ROWS) * TILE_ROWS


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """What kernels/qk_matmul.py has, of one head tile, whose query is turned: q_tile[first, d, r].

    Of the columns of q_tile beyond row_tile nothing is used.
    """
    rows, depth, tokens = tiling.row_tile, spec.head_dim // 2, tiling.padded_kv_tile
    steps = tiling.token_group // TILE_TOKENS

    @inline
    def stage(q_tile, first, keys, head_offset, tile, scores, slot):
        with T.sblock("qk_matmul"):
            T.reads(q_tile[first, 0:depth, 0:TILE_ROWS], whole(keys.memory), whole(keys.offsets))
            T.writes(scores[slot, 0:rows, 0:tokens])
            by_token = T.sblock_alloc_buffer((tokens, TILE_ROWS), "float32")
            for to, s, t, r, d in T.grid(tile.num_groups, steps, TILE_TOKENS, TILE_ROWS, depth):
                with T.sblock("scores"):
                    vs = T.axis.spatial(tokens // TILE_TOKENS, to * steps + s)
                    vt, vr, vd = T.axis.remap("SSR", [t, r, d])
                    with T.init():
                        by_token[vs * TILE_TOKENS + vt, vr] = T.float32(0)
                    by_token[vs * TILE_TOKENS + vt, vr] += dot_pairs(
                        rows_from(keys, vs * TILE_TOKENS, vt, head_offset, vd), q_tile[first, vd, vr]
                    )
            for to, s, t, r in T.grid(tile.num_groups, steps, TILE_TOKENS, rows):
                with T.sblock("turned_scores"):
                    vs = T.axis.spatial(tokens // TILE_TOKENS, to * steps + s)
                    vt, vr = T.axis.remap("SS", [t, r])
                    scores[slot, vr, vs * TILE_TOKENS + vt] = by_token[vs * TILE_TOKENS + vt, vr]

    return stage


def split_probs(tiling: Tiling) -> Callable[..., None]:
    """words[0, 2r, t] = the word of probs[slot, r, t] and 0, words[0, 2r + 1, t] = that of 0 and probs[slot, r, t].

    For num_groups token groups; probs are numbers of bfloat16, as float32. Of other rows nothing is written.
    """
    rows, num_rows, group, tokens = tiling.row_tile, _weight_rows(tiling), tiling.token_group, tiling.padded_kv_tile

    @inline
    def stage(probs, words, tile_sum, slot, num_groups):
        with T.sblock("split_probs"):
            T.reads(probs[slot, 0:rows, 0:tokens])
            T.writes(words[0, 0:num_rows, 0:tokens])
            for r, to, ti in T.grid(rows, num_groups, group):
                with T.sblock("even_weight"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    bits = T.meta_var(T.reinterpret("int32", probs[slot, vr, vt]))
                    words[0, vr * 2, vt] = T.bitwise_and(T.shift_right(bits, 16), LOW)
            for r, to, ti in T.grid(rows, num_groups, group):
                with T.sblock("odd_weight"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    words[0, vr * 2 + 1, vt] = T.reinterpret("int32", probs[slot, vr, vt])

    return stage


def pv_update(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The sblock pv_update: the outputs of one tile of rows, whose weights are split_probs' words, and their fold."""
    rows, dim, num_rows = tiling.row_tile, spec.result_dim, _weight_rows(tiling)
    sum_stage, element_stage = _sums(spec, tiling), _by_element(spec, tiling)
    find_infinite, fold_stage = _find_infinite(spec, tiling), state.fold(1, rows, dim)

    @inline
    def stage(weights, values, head_offset, tile, factors, running, step, num_steps, computed):
        with T.sblock("pv_update"):
            T.reads()
            T.writes()
            acc = T.sblock_alloc_buffer((num_rows, dim // 2), "float32")
            infinite = T.sblock_alloc_buffer((1,), "int32")
            sum_stage(weights, values, head_offset, tile, acc)
            find_infinite(acc, infinite)
            if infinite[0] != 0:
                element_stage(weights, values, head_offset, tile, acc)
            with T.sblock("fold"):
                T.reads(acc[0:num_rows, 0 : dim // 2], factors.running[0, 0:rows], factors.added[0, 0:rows])
                T.writes(running.acc[running.slot, 0:rows, 0:dim])
                tile_acc = T.sblock_alloc_buffer((1, rows, dim), "float32")
                for r, p, w in T.grid(rows, 2, dim // 2):
                    with T.sblock("in_order"):
                        vr, vp, vw = T.axis.remap("SSS", [r, p, w])
                        tile_acc[0, vr, vw * 2 + vp] = acc[vr * 2 + vp, vw]
                fold_stage(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage


def _sums(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """acc[m, w] = sum over t of dot_pairs(weights[0, m, t], word w of the value of the token in column t).

    In the caller's sblock, of all token groups that hold tokens, in their order, in passes over value_dims elements.
    """
    num_rows, width, group = _weight_rows(tiling), tiling.value_dims // 2, tiling.token_group
    tokens, steps, passes = tiling.padded_kv_tile, group // TILE_TOKENS, spec.result_dim // tiling.value_dims
    read = value_access(spec, tiling).pair

    def is_whole(tile, to):
        """Whether a token group holds nothing but tokens that are seen."""
        holds = to * group + group <= tile.valid_len
        return holds if tile.first_seen is None else T.And(holds, tile.sees(to * group))

    def seen(tile, word, column):
        sees = column < tile.valid_len
        return T.Select(sees if tile.first_seen is None else T.And(sees, tile.sees(column)), word, T.int32(0))

    @inline
    def stage(weights, values, head_offset, tile, acc):
        sums = T.sblock_alloc_buffer((num_rows, width), "float32")
        for p in range(passes):
            with T.sblock("clear_sums"):
                vp = T.axis.spatial(passes, p)
                T.reads()
                T.writes(sums[0:num_rows, 0:width])
                for m, w in T.grid(num_rows, width):
                    with T.sblock("no_sum"):
                        vm, vw = T.axis.remap("SS", [m, w])
                        sums[vm, vw] = T.float32(0)
            for to in range(tile.num_groups):
                if is_whole(tile, to):
                    for s, m, w, k in T.grid(steps, num_rows, width, TILE_TOKENS):
                        with T.sblock("whole_sum"):
                            vp = T.axis.spatial(passes, p)
                            vs = T.axis.reduce(tokens // TILE_TOKENS, to * steps + s)
                            vm, vw, vk = T.axis.remap("SSR", [m, w, k])
                            sums[vm, vw] = sums[vm, vw] + dot_pairs(
                                weights[0, vm, vs * TILE_TOKENS + vk],
                                rows_from(values, vs * TILE_TOKENS, vk, head_offset, vp * width + vw),
                            )
                else:
                    with T.sblock("edge_group"):
                        vp = T.axis.spatial(passes, p)
                        vto = T.axis.opaque(tokens // group, to)
                        T.reads()
                        T.writes()
                        edge = T.sblock_alloc_buffer((group, width), "int32")
                        for i, w in T.grid(group, width):
                            with T.sblock("edge_value"):
                                vi, vw = T.axis.remap("SS", [i, w])
                                edge[vi, vw] = seen(
                                    tile, read(values, vto * group + vi, head_offset, vp * width + vw), vto * group + vi
                                )
                        for s, m, w, k in T.grid(steps, num_rows, width, TILE_TOKENS):
                            with T.sblock("edge_sum"):
                                vs = T.axis.reduce(steps, s)
                                vm, vw, vk = T.axis.remap("SSR", [m, w, k])
                                sums[vm, vw] = sums[vm, vw] + dot_pairs(
                                    weights[0, vm, vto * group + vs * TILE_TOKENS + vk],
                                    edge[vs * TILE_TOKENS + vk, vw],
                                )
            with T.sblock("store_sums"):
                vp = T.axis.spatial(passes, p)
                T.reads(sums[0:num_rows, 0:width])
                T.writes(acc[0:num_rows, vp * width : vp * width + width])
                for m, w in T.grid(num_rows, width):
                    with T.sblock("stored_sum"):
                        vm, vw = T.axis.remap("SS", [m, w])
                        acc[vm, vp * width + vw] = sums[vm, vw]

    return stage


def _find_infinite(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """infinite[0] = 1 where the sums of a row have an infinity or a NaN, else 0."""
    rows, vectors = 2 * tiling.row_tile, spec.result_dim // 2 // TILE_ROWS

    @inline
    def stage(acc, infinite):
        with T.sblock("find_infinite"):
            T.reads(acc[0:rows, 0 : vectors * TILE_ROWS])
            T.writes(infinite[0:1])
            largest = T.sblock_alloc_buffer((TILE_ROWS,), "int32")
            for lane, m, w in T.grid(TILE_ROWS, rows, vectors):
                with T.sblock("largest"):
                    vlane = T.axis.spatial(TILE_ROWS, lane)
                    vm, vw = T.axis.remap("RR", [m, w])
                    with T.init():
                        largest[vlane] = 0
                    number = T.meta_var(T.reinterpret("int32", acc[vm, vw * TILE_ROWS + vlane]))
                    largest[vlane] = T.max(largest[vlane], T.bitwise_and(number, INFINITE))
            for lane in range(TILE_ROWS):
                with T.sblock("infinite"):
                    vlane = T.axis.reduce(TILE_ROWS, lane)
                    with T.init():
                        infinite[0] = 0
                    infinite[0] = T.Select(largest[vlane] == INFINITE, 1, infinite[0])

    return stage


def _by_element(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """acc[2r + p, w] = the sum of the weights of row r times element p of word w of what is seen."""
    rows, words, tokens = tiling.row_tile, spec.result_dim // 2, tiling.padded_kv_tile
    read = value_access(spec, tiling).pair

    def first_column(tile):
        return T.int32(0) if tile.first_seen is None else T.max(tile.first_seen - tile.start, 0)

    @inline
    def stage(weights, values, head_offset, tile, acc):
        begin: T.let = first_column(tile)
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
                    weight = T.meta_var(T.reinterpret("float32", weights[0, vr * 2 + 1, vt]))
                    element_acc[vr, vp, vw] += weight * half(read(values, vt, head_offset, vw), vp)
            for r, p, w in T.grid(rows, 2, words):
                with T.sblock("stored_element"):
                    vr, vp, vw = T.axis.remap("SSS", [r, p, w])
                    acc[vr * 2 + vp, vw] = element_acc[vr, vp, vw]

    return stage
