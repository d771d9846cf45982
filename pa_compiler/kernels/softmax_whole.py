"""Stage 2 where the matmuls take tiles whole: as softmax.py, with as little of a tile in memory as can be.

Scores lie in memory, since a matrix unit leaves them there, and so do the weights that it takes. What is between them,
scaled scores and exponentials, stays in registers: with copies of these, the tiles of keys and values would leave the
first-level cache, and each tile of rows would fetch its own scores from the second.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.kernels.elements import PAIR_OF_ONES, dot_pairs, pair_rounded
from pa_compiler.kernels.exp import store_weight
from pa_compiler.kernels.rows import OfRows, of_row
from pa_compiler.kernels.scores import are_products
from pa_compiler.kernels.sight import hide_scores
from pa_compiler.kernels.softmax import scale_scores
from pa_compiler.kernels.state import EMPTY_ROW_MAX
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline, opaque


def softmax_whole(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """As softmax_prepare, with weights as the words of pairs of tokens, pairs[slot, r, t], and nowhere else.

    Scores of the first num_full token groups, which all rows see, are scaled twice, for the maximum and for the
    exponential; the others, and all where they are more than products, are kept scaled. Of the first num_parts parts of
    Tiling.few_rows rows; the others become empty states, whatever their scores.
    """
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile
    part = tiling.few_rows or rows
    scale_stage, hide_stage, in_two = scale_scores(spec, tiling), hide_scores(), are_products(spec)
    full_weights, weights = _weights(tiling, "full_"), _weights(tiling, "")

    def product(scores, slot, scale, row, column):
        """A scaled score, rounded before anything is subtracted from it."""
        return tiling.fence(scores[slot, row, column] * scale)

    @inline
    def stage(scores, state, scale, headroom, tile, num_groups, scoring, pairs, num_full, num_parts):
        slot = T.meta_var(state.slot)
        tile_max = T.meta_var(state.row_max)
        tile_sum = T.meta_var(state.row_sum)
        num_done = T.meta_var(num_full if in_two else 0)
        scaled = T.sblock_alloc_buffer((rows, tokens), "float32")
        if in_two:
            full_peak = T.sblock_alloc_buffer((rows,), "float32")
            with T.sblock("full_scores"):
                T.reads(scores[slot, 0:rows, 0:tokens])
                T.writes(full_peak[0:rows])
                for p, r, to, ti in T.grid(num_parts, part, num_full, group):
                    with T.sblock("full_peak"):
                        vt = T.axis.reduce(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, p * part + r)
                        with T.init():
                            full_peak[vr] = T.min_value("float32")
                        full_peak[vr] = T.max(full_peak[vr], scores[slot, vr, vt] * scale)
        with T.sblock("seen_scores"):
            T.reads(scores[slot, 0:rows, 0:tokens], *scoring.regions)
            T.writes(scaled[0:rows, 0:tokens])
            scale_stage(scores, scaled, slot, scale, tile, num_done, num_groups, scoring)
            hide_stage(scaled, tile)
        room = T.sblock_alloc_buffer((1, rows), "int32")
        with T.sblock("softmax_prepare"):
            T.reads(scaled[0:rows, 0:tokens], *([full_peak[0:rows]] if in_two else []))
            T.writes(tile_max[slot, 0:rows], tile_sum[slot, 0:rows], room[0, 0:rows])
            peak = T.sblock_alloc_buffer((rows,), "float32")
            for r in range(rows):
                with T.sblock("empty"):
                    vr = T.axis.spatial(rows, r)
                    tile_max[slot, vr] = T.float32(EMPTY_ROW_MAX)
                    tile_sum[slot, vr] = T.float32(0)
            for p, r, to, ti in T.grid(num_parts, part, num_groups - num_done, group):
                with T.sblock("peak"):
                    vt = T.axis.reduce(tokens, (num_done + to) * group + ti)
                    vr = T.axis.spatial(rows, p * part + r)
                    with T.init():
                        peak[vr] = T.min_value("float32")
                    peak[vr] = T.max(peak[vr], scaled[vr, vt])
            for p, r in T.grid(num_parts, part):
                with T.sblock("tile_max"):
                    vr = T.axis.spatial(rows, p * part + r)
                    most = T.meta_var(T.max(full_peak[vr], peak[vr]) if in_two else peak[vr])
                    tile_max[slot, vr] = T.Select(0 < tile.valid_len, most, T.float32(EMPTY_ROW_MAX))
            for r in range(rows):
                with T.sblock("room"):
                    vr = T.axis.spatial(rows, r)
                    room[0, vr] = of_row(headroom, vr)
        places = T.meta_var(OfRows(room, 0) if spec.wide_range else headroom)
        if in_two:
            full_sum = T.sblock_alloc_buffer((1, rows), "float32")
            full_score = T.meta_var(lambda row, column: product(scores, slot, scale, row, column))
            full_weights(
                [scores[slot, 0:rows, 0:tokens], room[0, 0:rows]], full_score, tile_max, pairs, full_sum, slot, places,
                num_parts, 0, num_full, T.float32(0),
            )  # fmt: skip
        weights(
            [scaled[0:rows, 0:tokens], room[0, 0:rows], *([full_sum[slot, 0:rows]] if in_two else [])],
            lambda row, column: scaled[row, column], tile_max, pairs, tile_sum, slot, places, num_parts, num_done,
            num_groups,
            (lambda row: full_sum[slot, row]) if in_two else T.float32(0),
        )  # fmt: skip

    return stage


def _weights(tiling: Tiling, of: str) -> Callable[..., None]:
    """The sblock weights: pairs of the token groups from begin to end, and total[slot, r], what is in them added up from `before` on.

    score(row, column) is a scaled score, for which it reads what reads says.
    """
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile
    half, part = group // 2, tiling.few_rows or rows

    def first_of(before: Expr | Callable[[Expr], Expr], row: Expr) -> Expr:
        return before(row) if callable(before) else before

    @inline
    def stage(reads, score, tile_max, pairs, total, slot, places, num_parts, begin, end, before):
        with T.sblock(f"{of}weights"):
            T.reads(*reads, tile_max[slot, 0:rows])
            T.writes(pairs[slot, 0:rows, 0 : tokens // 2], total[slot, 0:rows])
            probs = T.sblock_alloc_buffer((rows, tokens), "float32")
            for p, r, to, ti in T.grid(num_parts, part, end - begin, group):
                with T.sblock(f"{of}probs"):
                    vt = T.axis.spatial(tokens, (begin + to) * group + ti)
                    vr = T.axis.spatial(rows, p * part + r)
                    store_weight(probs, (vr, vt), score(vr, vt) - tile_max[slot, vr], of_row(places, vr))
            for p, r, to, ti in T.grid(num_parts, part, end - begin, half):
                with T.sblock(f"{of}pairs"):
                    vt = T.axis.spatial(tokens // 2, (begin + to) * half + ti)
                    vr = T.axis.spatial(rows, p * part + r)
                    pairs[slot, vr, vt] = pair_rounded(probs[vr, 2 * vt], probs[vr, 2 * vt + 1])
            for p, r, to, ti in T.grid(num_parts, part, end - begin, half):
                with T.sblock(f"{of}tile_sum"):
                    vt = T.axis.reduce(tokens // 2, (begin + to) * half + ti)
                    vr = T.axis.spatial(rows, p * part + r)
                    with T.init():
                        total[slot, vr] = first_of(before, vr)
                    total[slot, vr] += dot_pairs(pairs[slot, vr, vt], opaque(T.int32(PAIR_OF_ONES)))

    return stage
