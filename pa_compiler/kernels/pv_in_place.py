"""Stage 3 where a matrix unit multiplies packed values as they lie in the cache: tile_acc = probs @ value tile.

A row of packed values has a pair of tokens, and is a row of the unit's right operand. Token groups that all rows see
whole are read in place. Of the others, at the ends of what is seen, what no row sees is 0 in a copy: a weight of 0
would leave in a value that is infinite or NaN. Where only some rows see such a value, products are made a row at a
time, with values of 0 in place of what the row does not see. Either way a row has the same bits: a product of 0 changes
no sum.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels import state
from pa_compiler.kernels.caches import rows_from, value_access
from pa_compiler.kernels.elements import HIGH, LOW, dot_pairs, larger_exponent
from pa_compiler.kernels.infinite import find_any
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline

_LANES = 16


def update_in_place(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The sblock pv_update: the outputs of one tile of rows, and their fold into the running state.

    num_full, and edges with the words of the columns after the first num_full groups, where rows see keys of their own.
    """
    rows, dim = tiling.row_tile, spec.result_dim
    pv_stage = _by_rows(spec, tiling) if tiling.many_tokens else _alike(spec, tiling)
    fold_stage = state.fold(1, rows, dim)

    @inline
    def stage(weights, values, head_offset, tile, factors, running, step, num_steps, computed, num_full=0, edges=None):
        with T.sblock("pv_update"):
            T.reads()
            T.writes()
            tile_acc = T.sblock_alloc_buffer((1, rows, dim), "float32")
            pv_stage(weights, values, head_offset, tile, tile_acc, num_full, edges)
            with T.sblock("fold"):
                T.reads(tile_acc[0, 0:rows, 0:dim], factors.running[0, 0:rows], factors.added[0, 0:rows])
                T.writes(running.acc[running.slot, 0:rows, 0:dim])
                fold_stage(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage


def _alike(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_acc where all rows see the same keys."""
    sum_stage = _sum_groups(spec, tiling, "")

    def is_whole(tile, group):
        """Whether a token group holds nothing but tokens that are seen."""
        first = group * tiling.token_group
        holds = first + tiling.token_group <= tile.valid_len
        return holds if tile.first_seen is None else T.And(holds, tile.sees(first))

    def seen(tile, word, pair):
        return T.bitwise_and(word, _ones(tile, pair))

    @inline
    def stage(weights, values, head_offset, tile, tile_acc, num_full, edges):
        sum_stage(
            weights, values, head_offset, tile, tile_acc,
            lambda group: is_whole(tile, group), lambda word, pair: seen(tile, word, pair),
        )  # fmt: skip

    return stage


def _by_rows(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_acc where each row sees keys of its own."""
    rows, dim = tiling.row_tile, spec.result_dim
    sum_stage, row_stage = _sum_groups(spec, tiling, ""), _sum_groups(spec, tiling, "row_")
    find_infinite = _find_infinite(spec, tiling)

    def seen(tile, word, pair):
        return T.bitwise_and(word, _ones(tile, pair))

    def seen_by(edges, row, word, pair):
        return T.bitwise_and(word, edges[row, pair])

    @inline
    def stage(weights, values, head_offset, tile, tile_acc, num_full, edges):
        infinite = T.sblock_alloc_buffer((1,), "int32")
        find_infinite(values, head_offset, tile, num_full, infinite)
        is_whole = T.meta_var(lambda group: group < num_full)
        if infinite[0] == 0:
            sum_stage(weights, values, head_offset, tile, tile_acc, is_whole, lambda word, pair: seen(tile, word, pair))
        else:
            for row in range(rows):
                with T.sblock("row_apart"):
                    vrow = T.axis.spatial(rows, row)
                    T.reads()
                    T.writes()
                    row_acc = T.sblock_alloc_buffer((1, rows, dim), "float32")
                    row_stage(
                        weights, values, head_offset, tile, row_acc, is_whole,
                        lambda word, pair: seen_by(edges, vrow, word, pair),  # noqa: B023
                    )  # fmt: skip
                    with T.sblock("row_of_acc"):
                        T.reads(row_acc[0, vrow, 0:dim])
                        T.writes(tile_acc[0, vrow, 0:dim])
                        for d in range(dim):
                            with T.sblock("row_output"):
                                vd = T.axis.spatial(dim, d)
                                tile_acc[0, vrow, vd] = row_acc[0, vrow, vd]

    return stage


def _ones(tile, pair):
    """The word of ones for the tokens of a pair of columns that some row sees, and of zeros for the others."""

    def ones(column):
        seen = column < tile.valid_len
        return T.Select(seen if tile.first_seen is None else T.And(seen, tile.sees(column)), T.int32(-1), T.int32(0))

    return T.bitwise_or(T.bitwise_and(ones(2 * pair), LOW), T.bitwise_and(ones(2 * pair + 1), HIGH))


def _find_infinite(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """infinite[0] = 1 where values that some row sees, after num_full groups, have an infinity or a NaN, else 0."""
    dim, pairs, group = spec.result_dim, tiling.padded_kv_tile // 2, tiling.token_group // 2
    read = value_access(spec, tiling).pair
    any_infinite = find_any(_LANES)

    @inline
    def stage(values, head_offset, tile, num_full, infinite):
        with T.sblock("find_infinite"):
            T.reads()
            T.writes(infinite[0:1])
            largest = T.sblock_alloc_buffer((_LANES,), "int32")
            for lane, to, ti, d in T.grid(_LANES, tile.num_groups - num_full, group, dim // _LANES):
                with T.sblock("largest"):
                    vlane = T.axis.spatial(_LANES, lane)
                    vt = T.axis.reduce(pairs, (num_full + to) * group + ti)
                    vd = T.axis.reduce(dim // _LANES, d)
                    with T.init():
                        largest[vlane] = 0
                    word = T.meta_var(read(values, vt, head_offset, vd * _LANES + vlane))
                    exponent = T.meta_var(larger_exponent(T.bitwise_and(word, _ones(tile, vt))))
                    largest[vlane] = T.max(largest[vlane], exponent)
            any_infinite(largest, infinite)

    return stage


def _sum_groups(spec: PagedAttentionSpec, tiling: Tiling, of: str) -> Callable[..., None]:
    """acc[0, r, d] = sum over t of dot_pairs(weights[0, r, t], values of the tokens in the columns 2t and 2t + 1).

    In the caller's sblock, of all token groups that hold tokens, in their order; in passes over value_dims elements,
    and in each in steps of value_pairs pairs of tokens. Groups that are not is_whole(group) are copied, as
    seen(word, pair). Weights are 0 of columns that a row does not see. `of` comes before the names of the sblocks.
    """
    rows, dims, group = tiling.row_tile, tiling.value_dims, tiling.token_group // 2
    pairs, step, passes = tiling.padded_kv_tile // 2, tiling.value_pairs, spec.result_dim // tiling.value_dims
    steps, read = group // step, value_access(spec, tiling).pair

    @inline
    def stage(weights, values, head_offset, tile, acc, is_whole, seen):
        sums = T.sblock_alloc_buffer((rows, dims), "float32")
        for p in range(passes):
            with T.sblock(f"{of}clear_sums"):
                vp = T.axis.spatial(passes, p)
                T.reads()
                T.writes(sums[0:rows, 0:dims])
                for r, d in T.grid(rows, dims):
                    with T.sblock(f"{of}no_sum"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        sums[vr, vd] = T.float32(0)
            for to in range(tile.num_groups):
                if is_whole(to):
                    for s, r, d, k in T.grid(steps, rows, dims, step):
                        with T.sblock(f"{of}whole_sum"):
                            vp = T.axis.spatial(passes, p)
                            vs = T.axis.reduce(pairs // step, to * steps + s)
                            vr, vd, vk = T.axis.remap("SSR", [r, d, k])
                            sums[vr, vd] = sums[vr, vd] + dot_pairs(
                                weights[0, vr, vs * step + vk],
                                rows_from(values, vs * 2 * step, vk, head_offset, vp * dims + vd),
                            )
                else:
                    with T.sblock(f"{of}edge_group"):
                        vp = T.axis.spatial(passes, p)
                        vto = T.axis.opaque(pairs // group, to)
                        T.reads()
                        T.writes()
                        edge = T.sblock_alloc_buffer((group, dims), "int32")
                        for i, d in T.grid(group, dims):
                            with T.sblock(f"{of}edge_value"):
                                vi, vd = T.axis.remap("SS", [i, d])
                                edge[vi, vd] = seen(
                                    read(values, vto * group + vi, head_offset, vp * dims + vd), vto * group + vi
                                )
                        for s, r, d, k in T.grid(steps, rows, dims, step):
                            with T.sblock(f"{of}edge_sum"):
                                vs = T.axis.reduce(steps, s)
                                vr, vd, vk = T.axis.remap("SSR", [r, d, k])
                                sums[vr, vd] = sums[vr, vd] + dot_pairs(
                                    weights[0, vr, vto * group + vs * step + vk], edge[vs * step + vk, vd]
                                )
            with T.sblock(f"{of}store_sums"):
                vp = T.axis.spatial(passes, p)
                T.reads(sums[0:rows, 0:dims])
                T.writes(acc[0, 0:rows, vp * dims : vp * dims + dims])
                for r, d in T.grid(rows, dims):
                    with T.sblock(f"{of}stored_sum"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        acc[0, vr, vp * dims + vd] = sums[vr, vd]

    return stage
