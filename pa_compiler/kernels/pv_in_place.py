"""Stage 3 where a matrix unit multiplies packed values as they lie in the cache: tile_acc = probs @ value tile.

A row of packed values has a pair of tokens, and is a row of the unit's right operand. Whole token groups that are seen
are read in place. Of the others, at the ends of what is seen, what holds no such token is 0 in a copy: a weight of 0
would not leave out a value that is infinite or NaN.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.caches import value_access, value_rows
from pa_compiler.kernels.elements import HIGH, LOW, dot_pairs
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


def pv_in_place(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_acc[0, r, d] = sum over t of dot_pairs(weights[0, r, t], values of the tokens in the columns 2t and 2t + 1).

    In the caller's sblock, of all token groups that hold tokens, in their order; in passes over value_dims elements, and
    in each in steps of value_pairs pairs of tokens. Weights are 0 of columns that hold no token that is seen.
    """
    rows, dims, group = tiling.row_tile, tiling.value_dims, tiling.token_group // 2
    pairs, step, passes = tiling.padded_kv_tile // 2, tiling.value_pairs, spec.result_dim // tiling.value_dims
    steps, read = group // step, value_access(spec, tiling).pair

    def holds_all(tile, number):
        """Whether a token group holds nothing but tokens that are seen."""
        first = number * tiling.token_group
        holds = first + tiling.token_group <= tile.valid_len
        return holds if tile.first_seen is None else T.And(holds, tile.sees(first))

    def ones(tile, column):
        """Whether the token in a column is seen, as bits."""
        seen = column < tile.valid_len
        return T.Select(seen if tile.first_seen is None else T.And(seen, tile.sees(column)), T.int32(-1), T.int32(0))

    def cleaned(word, tile, i):
        low, high = T.bitwise_and(ones(tile, 2 * i), LOW), T.bitwise_and(ones(tile, 2 * i + 1), HIGH)
        return T.bitwise_and(word, T.bitwise_or(low, high))

    @inline
    def stage(weights, values, head_offset, tile, tile_acc):
        sums = T.sblock_alloc_buffer((rows, dims), "float32")
        for p in range(passes):
            with T.sblock("clear_sums"):
                vp = T.axis.spatial(passes, p)
                T.reads()
                T.writes(sums[0:rows, 0:dims])
                for r, d in T.grid(rows, dims):
                    with T.sblock("no_sum"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        sums[vr, vd] = T.float32(0)
            for to in range(tile.num_groups):
                if holds_all(tile, to):
                    for s, r, d, k in T.grid(steps, rows, dims, step):
                        with T.sblock("whole_sum"):
                            vp = T.axis.spatial(passes, p)
                            vs = T.axis.reduce(pairs // step, to * steps + s)
                            vr, vd, vk = T.axis.remap("SSR", [r, d, k])
                            sums[vr, vd] = sums[vr, vd] + dot_pairs(
                                weights[0, vr, vs * step + vk],
                                value_rows(values, vs * 2 * step, vk, head_offset, vp * dims + vd),
                            )
                else:
                    with T.sblock("edge_group"):
                        vp = T.axis.spatial(passes, p)
                        vto = T.axis.opaque(pairs // group, to)
                        T.reads()
                        T.writes()
                        edge = T.sblock_alloc_buffer((group, dims), "int32")
                        for i, d in T.grid(group, dims):
                            with T.sblock("edge_value"):
                                vi, vd = T.axis.remap("SS", [i, d])
                                edge[vi, vd] = cleaned(
                                    read(values, vto * group + vi, head_offset, vp * dims + vd), tile, vto * group + vi
                                )
                        for s, r, d, k in T.grid(steps, rows, dims, step):
                            with T.sblock("edge_sum"):
                                vs = T.axis.reduce(steps, s)
                                vr, vd, vk = T.axis.remap("SSR", [r, d, k])
                                sums[vr, vd] = sums[vr, vd] + dot_pairs(
                                    weights[0, vr, vto * group + vs * step + vk], edge[vs * step + vk, vd]
                                )
            with T.sblock("store_sums"):
                vp = T.axis.spatial(passes, p)
                T.reads(sums[0:rows, 0:dims])
                T.writes(tile_acc[0, 0:rows, vp * dims : vp * dims + dims])
                for r, d in T.grid(rows, dims):
                    with T.sblock("stored_sum"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        tile_acc[0, vr, vp * dims + vd] = sums[vr, vd]

    return stage
