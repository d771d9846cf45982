"""Stage 2: the maximum, the exponentials and their sum over one tile of scores."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.elements import (
    PAIR_OF_ONES,
    dot_pairs,
    pair_floats,
    pair_rounded,
    round_to_bfloat16,
    round_up_to_bfloat16,
)
from pa_compiler.kernels.exp import store_exp, store_weight
from pa_compiler.kernels.integers import integer_weights
from pa_compiler.kernels.rows import OfRows, of_row
from pa_compiler.kernels.scores import Scores, are_products, sees, slope_of
from pa_compiler.kernels.sight import hide_scores
from pa_compiler.kernels.state import EMPTY_ROW_MAX
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline, opaque


def softmax_prepare(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """row_max = max over t of s, probs = exp(s - row_max) / 2**headroom, row_sum their sum; s = scored(scale * scores).

    headroom is the sequence's (kernels/headroom.py). s is rounded once and kept: a fused multiply-add with -row_max
    would leave the product's rounding error in the exponent of the maximum, which shows from scores of 1e5 on. Over the
    columns of the first num_groups token groups; those that hold no token that is seen count as -inf and get probs of
    exactly 0 whatever their scores hold, NaN included. With valid_len == 0: row_max = EMPTY_ROW_MAX, row_sum = 0,
    probs = 0. Products of -inf get probs of 0, and a row of nothing else is as an empty one, whose sum is 0; with one
    of +inf or NaN row_sum is NaN. The sum is over what pv_matmul multiplies: float32 as it is, or, where that takes
    pairs, rounded to bfloat16.

    scoring is what scores.py has besides the product; None where the spec has no function of scores. All rows of a tile
    with a sight see the first num_full token groups.
    """
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile
    scale_stage, full_stage, hide_stage = scale_scores(spec, tiling), _scale_full(tiling), hide_scores()

    # keys that all rows see have a form of their own; beside functions of scores the comparison weighs little
    in_two, of_rows = tiling.many_tokens and are_products(spec), tiling.many_tokens and spec.wide_range
    in_pairs = tiling.many_tokens and tiling.rounds_weights
    pairs_stage, in_step = pair_weights(tiling), tiling.weight_sums > 0
    weigh, rounded = (store_weight, round_up_to_bfloat16) if in_step else (store_exp, round_to_bfloat16)
    valid = () if in_step else (True,)

    @inline
    def stage(scores, probs, state, scale, headroom, tile, num_groups, scoring, pairs=None, num_full=0):
        slot = T.meta_var(state.slot)
        tile_max = T.meta_var(state.row_max)
        tile_sum = T.meta_var(state.row_sum)
        num_done = T.meta_var(num_full if in_two else 0)
        if tiling.many_tokens:
            scaled = T.sblock_alloc_buffer((rows, tokens), "float32")
            if in_two:
                full_peak = T.sblock_alloc_buffer((rows,), "float32")
                full_stage(scores, scaled, full_peak, slot, scale, num_full, scoring)
            with T.sblock("seen_scores"):
                T.reads(scores[slot, 0:rows, 0:tokens], *scoring.regions)
                T.writes(scaled[0:rows, 0:tokens])
                scale_stage(scores, scaled, slot, scale, tile, num_done, num_groups, scoring)
                hide_stage(scaled, tile)
        read = T.meta_var(
            [scaled[0:rows, 0:tokens]] if tiling.many_tokens else [scores[slot, 0:rows, 0:tokens], *scoring.regions]
        )
        with T.sblock("softmax_prepare"):
            T.reads(*read, *([full_peak[0:rows]] if in_two else []))
            T.writes(
                probs[slot, 0:rows, 0:tokens],
                tile_max[slot, 0:rows],
                *([tile_sum[slot, 0:rows]] if in_pairs or not tiling.pairs_weights else []),
                *([pairs[slot, 0:rows, 0 : tokens // 2]] if in_pairs else []),
            )
            if not tiling.many_tokens:
                scaled = T.sblock_alloc_buffer((rows, tokens), "float32")
            peak = T.sblock_alloc_buffer((rows,), "float32")
            if not tiling.many_tokens:
                scale_stage(scores, scaled, slot, scale, tile, 0, num_groups, scoring)
            for r, to, ti in T.grid(rows, num_groups - num_done, group):
                with T.sblock("peak"):
                    vt = T.axis.reduce(tokens, (num_done + to) * group + ti)
                    vr = T.axis.spatial(rows, r)
                    with T.init():
                        peak[vr] = T.min_value("float32")
                    peak[vr] = T.max(peak[vr], scaled[vr, vt])
            for r in range(rows):
                with T.sblock("tile_max"):
                    vr = T.axis.spatial(rows, r)
                    most = T.meta_var(T.max(full_peak[vr], peak[vr]) if in_two else peak[vr])
                    tile_max[slot, vr] = T.Select(0 < tile.valid_len, most, T.float32(EMPTY_ROW_MAX))
            if tiling.many_tokens:
                if of_rows:
                    room = T.sblock_alloc_buffer((1, rows), "int32")
                    for r in range(rows):
                        with T.sblock("room"):
                            vr = T.axis.spatial(rows, r)
                            room[0, vr] = of_row(headroom, vr)
                places = T.meta_var(OfRows(room, 0) if of_rows else headroom)
                for r, to, ti in T.grid(rows, num_groups, group):
                    with T.sblock("probs"):
                        vt = T.axis.spatial(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, r)
                        shifted = T.meta_var(scaled[vr, vt] - tile_max[slot, vr])
                        if in_pairs:
                            store_weight(probs, (slot, vr, vt), shifted, of_row(places, vr))
                        else:
                            store_exp(probs, (slot, vr, vt), shifted, True, of_row(places, vr))
            elif tiling.rounds_weights:
                exact = T.sblock_alloc_buffer((rows, tokens), "float32")
                for r, to, ti in T.grid(rows, num_groups, group):
                    with T.sblock("exact"):
                        vt = T.axis.spatial(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, r)
                        weigh(exact, (vr, vt), scaled[vr, vt] - tile_max[slot, vr], *valid, of_row(headroom, vr))
                for r, to, ti in T.grid(rows, num_groups, group):
                    with T.sblock("probs"):
                        vt = T.axis.spatial(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, r)
                        probs[slot, vr, vt] = rounded(exact[vr, vt])
            else:
                for r, to, ti in T.grid(rows, num_groups, group):
                    with T.sblock("probs"):
                        vt = T.axis.spatial(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, r)
                        store_exp(
                            probs, (slot, vr, vt), scaled[vr, vt] - tile_max[slot, vr], True, of_row(headroom, vr)
                        )
            if in_pairs:
                pairs_stage(probs, pairs, tile_sum, slot, num_groups)
            elif not tiling.pairs_weights:  # otherwise pair_probs adds up the pairs
                for r, to, ti in T.grid(rows, num_groups, group):
                    with T.sblock("tile_sum"):
                        vt = T.axis.reduce(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, r)
                        with T.init():
                            tile_sum[slot, vr] = T.float32(0)
                        tile_sum[slot, vr] = tile_sum[slot, vr] + probs[slot, vr, vt]

    return stage


def _scale_full(tiling: Tiling) -> Callable[..., None]:
    """scaled = scale * scores of the first num_full token groups, which all rows see, and full_peak, their maximum."""
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile

    @inline
    def stage(scores, scaled, full_peak, slot, scale, num_full, scoring):
        with T.sblock("full_scores"):
            T.reads(scores[slot, 0:rows, 0:tokens], *scoring.regions)
            T.writes(scaled[0:rows, 0:tokens], full_peak[0:rows])
            for r, to, ti in T.grid(rows, num_full, group):
                with T.sblock("full_scaled"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    scaled[vr, vt] = scoring.product(scores[slot, vr, vt], scale, vr, vt).expression
            for r, to, ti in T.grid(rows, num_full, group):
                with T.sblock("full_peak"):
                    vt = T.axis.reduce(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    with T.init():
                        full_peak[vr] = T.min_value("float32")
                    full_peak[vr] = T.max(full_peak[vr], scaled[vr, vt])

    return stage


def scale_scores(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """scaled = scored(scale * scores), or -inf where a row does not see the key; in the caller's sblock.

    Of the token groups from begin to end; begin is 0 where there are functions of scores.
    """
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile
    functions = Scores(spec, tiling)

    @inline
    def stage(scores, scaled, slot, scale, tile, begin, end, scoring):
        if spec.alibi:
            slope = T.sblock_alloc_buffer((rows,), "float32")
            for r in range(rows):
                with T.sblock("slope"):
                    vr = T.axis.spatial(rows, r)
                    slope[vr] = slope_of(scoring, vr)
        product = T.meta_var(lambda r, t: scoring.product(scores[slot, r, t], scale, r, t))
        kept = T.meta_var(functions.keep(product, scoring, end))
        for r, to, ti in T.grid(rows, end - begin, group):
            with T.sblock("scaled"):
                vo = T.axis.spatial(tokens // group, begin + to)
                vi = T.axis.spatial(group, ti)
                vr = T.axis.spatial(rows, r)
                column = T.meta_var(vo * group + vi)
                bias = T.meta_var(slope[vr] if spec.alibi else None)
                biased = T.meta_var(functions.scored(product(vr, column), scoring, bias, kept, tile, vr, column))
                seen = T.meta_var(sees(scoring, tile, vo, vi, (slot, vr, column)))
                if scoring.computed is not None:
                    T.reads(*seen.reads, *biased.reads)
                    T.writes(scaled[vr, column])
                scaled[vr, column] = T.Select(seen.expression, biased.expression, T.float32("-inf"))

    return stage


def pair_weights(tiling: Tiling) -> Callable[..., None]:
    """pairs[slot, r, t] = the word of probs[slot, r, 2t] and probs[slot, r, 2t + 1], rounded to bfloat16; and tile_sum.

    In the caller's sblock, for num_groups token groups. tile_sum is the sum of what is in the words.
    """
    rows, half, tokens = tiling.row_tile, tiling.token_group // 2, tiling.padded_kv_tile // 2
    sum_stage = _sum_pairs(tiling)

    @inline
    def stage(probs, pairs, tile_sum, slot, num_groups):
        for r, to, ti in T.grid(rows, num_groups, half):
            with T.sblock("pairs"):
                vt = T.axis.spatial(tokens, to * half + ti)
                vr = T.axis.spatial(rows, r)
                pairs[slot, vr, vt] = pair_rounded(probs[slot, vr, 2 * vt], probs[slot, vr, 2 * vt + 1])
        sum_stage(pairs, tile_sum, slot, num_groups)

    return stage


def _sum_pairs(tiling: Tiling) -> Callable[..., None]:
    """tile_sum of what is in the words of pairs, in the caller's sblock."""
    rows, half, tokens = tiling.row_tile, tiling.token_group // 2, tiling.padded_kv_tile // 2

    @inline
    def stage(pairs, tile_sum, slot, num_groups):
        for r, to, ti in T.grid(rows, num_groups, half):
            with T.sblock("tile_sum"):
                vt = T.axis.reduce(tokens, to * half + ti)
                vr = T.axis.spatial(rows, r)
                with T.init():
                    tile_sum[slot, vr] = T.float32(0)
                tile_sum[slot, vr] += dot_pairs(pairs[slot, vr, vt], opaque(T.int32(PAIR_OF_ONES)))

    return stage


def pair_probs(tiling: Tiling) -> Callable[..., None]:
    """pairs[slot, r, t] = the word of probs[slot, r, 2t] and probs[slot, r, 2t + 1], for num_groups token groups.

    With Tiling.pairs_weights also tile_sum, the sum of what is in the words. Of integers also their units.
    """
    if tiling.values.integers:
        return integer_weights(tiling)
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile
    sums, sum_stage = tiling.pairs_weights, _sum_pairs(tiling)

    @inline
    def stage(probs, pairs, tile_sum, slot, num_groups, units=None, lost=None):
        with T.sblock("pair_probs"):
            T.reads(probs[slot, 0:rows, 0:tokens])
            T.writes(pairs[slot, 0:rows, 0 : tokens // 2], *([tile_sum[slot, 0:rows]] if sums else []))
            for r, to, ti in T.grid(rows, num_groups, group // 2):
                with T.sblock("pairs"):
                    vt = T.axis.spatial(tokens // 2, to * (group // 2) + ti)
                    vr = T.axis.spatial(rows, r)
                    pairs[slot, vr, vt] = pair_floats(probs[slot, vr, 2 * vt], probs[slot, vr, 2 * vt + 1])

            if sums:
                sum_stage(pairs, tile_sum, slot, num_groups)

    return stage
