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
from pa_compiler.kernels.rows import OfRows, by_rows, of_row
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
    exponential; the others, and all where they are more than products, are kept scaled. With num_rows up to few_rows
    the rows after these become empty states, whatever their scores.
    """
    rows, tokens, in_two = tiling.row_tile, tiling.padded_kv_tile, are_products(spec)
    scale_stage, hide_stage = scale_scores(spec, tiling), hide_scores()
    weigh = by_rows(tiling, lambda few: _softmax_few(spec, tiling) if few else _softmax(spec, tiling, "", rows))

    @inline
    def stage(scores, state, scale, headroom, tile, num_groups, scoring, pairs, num_full, num_rows):
        slot = T.meta_var(state.slot)
        num_done = T.meta_var(num_full if in_two else 0)
        scaled = T.sblock_alloc_buffer((rows, tokens), "float32")
        with T.sblock("seen_scores"):
            T.reads(scores[slot, 0:rows, 0:tokens], *scoring.regions)
            T.writes(scaled[0:rows, 0:tokens])
            scale_stage(scores, scaled, slot, scale, tile, num_done, num_groups, scoring)
            hide_stage(scaled, tile)
        weigh(num_rows, scores, scaled, state, scale, headroom, tile.valid_len, num_done, num_groups, pairs)

    return stage


def _softmax_few(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """_softmax of the first few_rows rows. Those after them become empty states."""
    few, rows = tiling.few_rows, tiling.row_tile
    weigh = _softmax(spec, tiling, "few_", few)

    @inline
    def stage(scores, scaled, state, scale, headroom, valid_len, num_full, num_groups, pairs):
        with T.sblock("empty_rest"):
            T.reads()
            T.writes(state.row_max[state.slot, few:rows], state.row_sum[state.slot, few:rows])
            for r in range(rows - few):
                with T.sblock("empty_row_of_rest"):
                    vr = T.axis.spatial(rows, few + r)
                    state.row_max[state.slot, vr] = T.float32(EMPTY_ROW_MAX)
                    state.row_sum[state.slot, vr] = T.float32(0)
        weigh(scores, scaled, state, scale, headroom, valid_len, num_full, num_groups, pairs)

    return stage


def _softmax(spec: PagedAttentionSpec, tiling: Tiling, of: str, rows: int) -> Callable[..., None]:
    """The maxima, weights and sums of the first `rows` rows; `of` comes before the names of the sblocks."""
    group, tokens, in_two, parts = tiling.token_group, tiling.padded_kv_tile, are_products(spec), _parts(tiling)
    full_weights, weights = (_weights(tiling, f"{of}{part}", rows) for part in ("full_", ""))

    def product(scores, slot, scale, row, column):
        """A scaled score, rounded before anything is subtracted from it."""
        return tiling.fence(scores[slot, row, column] * scale)

    @inline
    def stage(scores, scaled, state, scale, headroom, valid_len, num_full, num_groups, pairs):
        slot = T.meta_var(state.slot)
        tile_max = T.meta_var(state.row_max)
        tile_sum = T.meta_var(state.row_sum)
        if in_two:
            full_peak = T.sblock_alloc_buffer((rows,), "float32")
            with T.sblock(f"{of}full_scores"):
                T.reads(scores[slot, 0:rows, 0:tokens])
                T.writes(full_peak[0:rows])
                for r, to, ti in T.grid(rows, num_full, group):
                    with T.sblock(f"{of}full_peak"):
                        vt = T.axis.reduce(tokens, to * group + ti)
                        vr = T.axis.spatial(rows, r)
                        with T.init():
                            full_peak[vr] = T.min_value("float32")
                        full_peak[vr] = T.max(full_peak[vr], scores[slot, vr, vt] * scale)
        room = T.sblock_alloc_buffer((1, rows), "int32")
        with T.sblock(f"{of}maxima"):
            T.reads(scaled[0:rows, 0:tokens], *([full_peak[0:rows]] if in_two else []))
            T.writes(tile_max[slot, 0:rows], room[0, 0:rows])
            peak = T.sblock_alloc_buffer((rows,), "float32")
            for r, to, ti in T.grid(rows, num_groups - num_full, group):
                with T.sblock(f"{of}peak"):
                    vt = T.axis.reduce(tokens, (num_full + to) * group + ti)
                    vr = T.axis.spatial(rows, r)
                    with T.init():
                        peak[vr] = T.min_value("float32")
                    peak[vr] = T.max(peak[vr], scaled[vr, vt])
            for r in range(rows):
                with T.sblock(f"{of}tile_max"):
                    vr = T.axis.spatial(rows, r)
                    most = T.meta_var(T.max(full_peak[vr], peak[vr]) if in_two else peak[vr])
                    tile_max[slot, vr] = T.Select(0 < valid_len, most, T.float32(EMPTY_ROW_MAX))
            for r in range(rows):
                with T.sblock(f"{of}room"):
                    vr = T.axis.spatial(rows, r)
                    room[0, vr] = of_row(headroom, vr)
        places = T.meta_var(OfRows(room, 0) if spec.wide_range else headroom)
        sums = T.sblock_alloc_buffer((parts, rows), "float32")
        if in_two:
            full_sums = T.sblock_alloc_buffer((parts, rows), "float32")
            full_score = T.meta_var(lambda row, column: product(scores, slot, scale, row, column))
            full_weights(
                [scores[slot, 0:rows, 0:tokens], room[0, 0:rows]], full_score, tile_max, pairs, full_sums, slot, places,
                0, num_full, T.float32(0),
            )  # fmt: skip
        weights(
            [scaled[0:rows, 0:tokens], room[0, 0:rows], *([full_sums[0:parts, 0:rows]] if in_two else [])],
            lambda row, column: scaled[row, column], tile_max, pairs, sums, slot, places, num_full, num_groups,
            (lambda part, row: full_sums[part, row]) if in_two else T.float32(0),
        )  # fmt: skip
        with T.sblock(f"{of}weight_sum"):
            T.reads(sums[0:parts, 0:rows])
            T.writes(tile_sum[slot, 0:rows])
            for r, p in T.grid(rows, parts):
                with T.sblock(f"{of}tile_sum"):
                    vr, vp = T.axis.remap("SR", [r, p])
                    with T.init():
                        tile_sum[slot, vr] = T.float32(0)
                    tile_sum[slot, vr] += sums[vp, vr]

    return stage


def _weights(tiling: Tiling, of: str, rows: int) -> Callable[..., None]:
    """The sblock weights: pairs of the token groups from begin to end, and sums[p, r], their sums from `before` on.

    Sum p is that of each _parts-th pair. score(row, column) is a scaled score, for which it reads what reads says.
    """
    group, tokens, parts = tiling.token_group, tiling.padded_kv_tile, _parts(tiling)
    half = group // 2 // parts

    def first_of(before: Expr | Callable[[Expr, Expr], Expr], part: Expr, row: Expr) -> Expr:
        return before(part, row) if callable(before) else before

    @inline
    def stage(reads, score, tile_max, pairs, sums, slot, places, begin, end, before):
        with T.sblock(f"{of}weights"):
            T.reads(*reads, tile_max[slot, 0:rows])
            T.writes(pairs[slot, 0:rows, 0 : tokens // 2], sums[0:parts, 0:rows])
            probs = T.sblock_alloc_buffer((rows, tokens), "float32")
            for r, to, ti in T.grid(rows, end - begin, group):
                with T.sblock(f"{of}probs"):
                    vt = T.axis.spatial(tokens, (begin + to) * group + ti)
                    vr = T.axis.spatial(rows, r)
                    store_weight(probs, (vr, vt), score(vr, vt) - tile_max[slot, vr], of_row(places, vr))
            for r, p, to, ti in T.grid(rows, parts, end - begin, half):
                with T.sblock(f"{of}pairs"):
                    vt = T.axis.spatial(tokens // 2, ((begin + to) * half + ti) * parts + p)
                    vr = T.axis.spatial(rows, r)
                    pairs[slot, vr, vt] = pair_rounded(probs[vr, 2 * vt], probs[vr, 2 * vt + 1])
            for r, p, to, ti in T.grid(rows, parts, end - begin, half):
                with T.sblock(f"{of}part_sum"):
                    vp = T.axis.spatial(parts, p)
                    vt = T.axis.reduce(tokens // 2 // parts, (begin + to) * half + ti)
                    vr = T.axis.spatial(rows, r)
                    with T.init():
                        sums[vp, vr] = first_of(before, vp, vr)
                    sums[vp, vr] += dot_pairs(pairs[slot, vr, vt * parts + vp], opaque(T.int32(PAIR_OF_ONES)))

    return stage


def _parts(tiling: Tiling) -> int:
    """In how many sums the pairs of a tile are added up: as decode does, where it gives the same bits."""
    return max(tiling.weight_sums // 2, 1)
