"""Stage 2: the maximum, the exponentials and their sum over one tile of scores."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.exp import store_exp
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling

EMPTY_ROW_MAX = -1e30
"""row_max of a tile with no tokens. Only its row_sum, which is exactly 0, says that it is empty."""


def softmax_prepare(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_max = max over t of scale * scores; probs = exp(scale * scores - tile_max); tile_sum = sum over t of probs.

    scale * scores is rounded once and kept: a fused multiply-add with -tile_max would leave the product's rounding
    error in the exponent of the maximum, which shows from scores of 1e5 on. Over the first num_groups * token_group
    columns; columns at or past valid_len count as -inf and get probs of exactly 0 whatever their scores hold, NaN
    included. With valid_len == 0: tile_max = -1e30, tile_sum = 0, probs = 0. Products past float32's range give NaN.
    Probabilities stay float32: the sum is over what pv_matmul multiplies, and nothing is rounded twice.
    """
    rows, group, tokens = tiling.row_tile, tiling.token_group, tiling.padded_kv_tile

    @T.inline
    def stage(scores, probs, tile_max, tile_sum, slot, scale, valid_len, num_groups):
        with T.sblock("softmax_prepare"):
            T.reads(scores[slot, 0:tokens, 0:rows])
            T.writes(probs[slot, 0:tokens, 0:rows], tile_max[slot, 0:rows], tile_sum[slot, 0:rows])
            scaled = T.sblock_alloc_buffer((tokens, rows), "float32")
            for to, ti, r in T.grid(num_groups, group, rows):
                with T.sblock("scaled"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    scaled[vt, vr] = T.Select(vt < valid_len, scores[slot, vt, vr] * scale, T.float32("-inf"))
            for to, ti, r in T.grid(num_groups, group, rows):
                with T.sblock("tile_max"):
                    vt = T.axis.reduce(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    with T.init():
                        tile_max[slot, vr] = T.Select(0 < valid_len, T.float32("-inf"), T.float32(EMPTY_ROW_MAX))
                    tile_max[slot, vr] = T.max(tile_max[slot, vr], scaled[vt, vr])
            for to, ti, r in T.grid(num_groups, group, rows):
                with T.sblock("probs"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    store_exp(probs, (slot, vt, vr), scaled[vt, vr] - tile_max[slot, vr], vt < valid_len)
            for to, ti, r in T.grid(num_groups, group, rows):
                with T.sblock("tile_sum"):
                    vt = T.axis.reduce(tokens, to * group + ti)
                    vr = T.axis.spatial(rows, r)
                    with T.init():
                        tile_sum[slot, vr] = T.float32(0)
                    tile_sum[slot, vr] = tile_sum[slot, vr] + probs[slot, vt, vr]

    return stage
