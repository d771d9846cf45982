"""Stage 3 where the matmul takes tiles whole: tile_acc = probs @ value tile, with what a row does not see in it.

As matrix units multiply, all rows by all tokens. A weight of 0 leaves out what a row does not see, unless the value is
infinite or NaN. Whether a tile has such values that not all rows see is found once for all of its rows; they are then
multiplied a row at a time, with values of 0 in place of what the row does not see.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels import state
from pa_compiler.kernels.caches import copy_shape, load_tile, value_access, whole
from pa_compiler.kernels.computed import words_of
from pa_compiler.kernels.elements import LOW, dot_pairs, larger_exponent, pair_halves
from pa_compiler.kernels.infinite import find_any
from pa_compiler.kernels.rows import begins_late, by_rows
from pa_compiler.kernels.sight import find_edges
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline

_LANES = 16


def _load_pairs(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The sblock load_values: copy[p, d] = the word of element d of the tokens 2p and 2p + 1, of num_groups groups.

    Of tokens whose rows lie in words of two elements. The rows are copied first, as they are.
    """
    tokens, group, dim = tiling.padded_kv_tile, tiling.token_group, spec.result_dim
    words = dim // tiling.values.word

    @inline
    def stage(cache, copy, head_offset, num_groups):
        with T.sblock("load_values"):
            T.reads(whole(cache.memory), whole(cache.offsets))
            T.writes(copy[0 : tokens // 2, 0:dim])
            rows = T.sblock_alloc_buffer((tokens, words), "int32")
            for to, ti, w in T.grid(num_groups, group, words):
                with T.sblock("load_rows_element"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vw = T.axis.spatial(words, w)
                    T.reads(whole(cache.memory), whole(cache.offsets))
                    T.writes(rows[vt, vw])
                    rows[vt, vw] = cache.memory[cache.offsets[vt] + head_offset + T.Cast("int64", vw)]
            for to, ti, d in T.grid(num_groups, group // 2, dim):
                with T.sblock("load_values_element"):
                    vp = T.axis.spatial(tokens // 2, to * (group // 2) + ti)
                    vd = T.axis.spatial(dim, d)
                    copy[vp, vd] = pair_halves(rows[2 * vp, T.floordiv(vd, 2)], rows[2 * vp + 1, T.floordiv(vd, 2)], vd)

    return stage


def load_whole(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The copy of a tile of values as it is multiplied, [tokens / 2, value_dim], and infinite[0]: see _find_infinite.

    All rows see the keys before seen_by_all, but for what a tree, a window or a mask hides.
    """
    packed, shape = spec.kv_layout == "packed", copy_shape(tiling, tiling.values, spec.result_dim)
    load_values = load_tile(tiling, value_access(spec, tiling), tiling.values, shape, "load_values")
    load = load_values if packed else _load_pairs(spec, tiling)
    clear_unused, find_infinite = _clear_unused(spec, tiling), _find_infinite(spec, tiling)
    always = begins_late(spec, many_tokens=True) or bool(spec.functions)

    def num_asked(tile, seen_by_all, tree):
        """Token groups of which some row may not see all."""
        if always:
            return tile.num_groups
        hides = T.Or(tree.present, seen_by_all < tile.start + tile.valid_len)
        return T.Select(hides, tile.num_groups, 0)

    @inline
    def stage(cache, copy, infinite, head_offset, tile, seen_by_all, tree):
        load(cache, copy, head_offset, tile.num_groups)
        if packed:
            clear_unused(copy, tile)
        find_infinite(copy, infinite, num_asked(tile, seen_by_all, tree))

    return stage


def _find_infinite(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """infinite[0] = 1 where the pairs of the first num_groups token groups have an infinity or a NaN, else 0.

    values: the copy of a tile, [tokens / 2, value_dim].
    """
    dim, pairs, group = spec.result_dim, tiling.padded_kv_tile // 2, tiling.token_group // 2
    any_infinite = find_any(_LANES)

    @inline
    def stage(values, infinite, num_groups):
        with T.sblock("find_infinite"):
            T.reads(values[0:pairs, 0:dim])
            T.writes(infinite[0:1])
            largest = T.sblock_alloc_buffer((_LANES,), "int32")
            for lane, d, to, ti in T.grid(_LANES, dim, num_groups, group // _LANES):
                with T.sblock("largest"):
                    vlane, vd = T.axis.remap("SR", [lane, d])
                    vt = T.axis.reduce(pairs // _LANES, to * (group // _LANES) + ti)
                    with T.init():
                        largest[vlane] = 0
                    largest[vlane] = T.max(largest[vlane], larger_exponent(values[vt * _LANES + vlane, vd]))
            any_infinite(largest, infinite)

    return stage


def _clear_unused(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """Clear what the copy of a tile of packed values has beside the last of an odd number of tokens: an unused slot.

    So too in the columns that fill up its last token group, which name that token again.
    """
    dim, pairs, group = spec.result_dim, tiling.padded_kv_tile // 2, tiling.token_group // 2

    @inline
    def stage(values, tile):
        if T.floormod(tile.valid_len, 2) == 1:
            for t, d in T.grid(tile.num_groups * group - T.floordiv(tile.valid_len, 2), dim):
                with T.sblock("unused_value"):
                    vt = T.axis.spatial(pairs, T.floordiv(tile.valid_len, 2) + t)
                    vd = T.axis.spatial(dim, d)
                    values[vt, vd] = T.bitwise_and(values[vt, vd], LOW)

    return stage


def pv_whole(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """acc = alpha * acc + beta * the sum over t of dot_pairs(weights[0, r, t], values[t, d]): state.fold of the sums.

    In the caller's sblock, for the tile's whole token groups; weights are 0 of what a row does not see. infinite: what
    load_whole says. edges gets the words of the columns after the first num_full groups where it is needed, and
    computed has those of a mask.
    """
    rows, dim, pairs, group = tiling.row_tile, spec.result_dim, tiling.padded_kv_tile // 2, tiling.token_group // 2
    products, products_apart = by_rows(tiling, lambda few: _products(spec, tiling, few)), _products_apart(spec, tiling)
    edges_stage, fold_apart = find_edges(tiling), state.fold(1, rows, dim, "apart_")

    def seen(value, computed, edges, row, t, num_full):
        for word in words_of(computed, 0, row, t):
            value = T.bitwise_and(value, word)
        return T.bitwise_and(value, T.Select(t < num_full * group, T.int32(-1), edges[row, t]))

    @inline
    def stage(num_rows, weights, values, infinite, tile, num_full, computed, edges, factors, running, step, num_steps):
        if infinite[0] == 0:
            products(num_rows, weights, values, tile.num_groups, factors, running, step, num_steps)
        else:
            tile_acc = T.sblock_alloc_buffer((1, rows, dim), "float32")
            edges_stage(edges, tile, num_full)
            for row in range(num_rows):
                with T.sblock("row_apart"):
                    vrow = T.axis.spatial(rows, row)
                    T.reads()
                    T.writes()
                    row_values = T.sblock_alloc_buffer((pairs, dim), "int32")
                    row_acc = T.sblock_alloc_buffer((1, rows, dim), "float32")
                    with T.sblock("row_values"):
                        T.reads()
                        T.writes(row_values[0:pairs, 0:dim])
                        for to, ti, d in T.grid(tile.num_groups, group, dim):
                            with T.sblock("row_value"):
                                vt = T.axis.spatial(pairs, to * group + ti)
                                vd = T.axis.spatial(dim, d)
                                T.reads(values[vt, vd], edges[vrow, vt], *words_of(computed, 0, vrow, vt))
                                T.writes(row_values[vt, vd])
                                row_values[vt, vd] = seen(values[vt, vd], computed, edges, vrow, vt, num_full)
                    products_apart(weights, row_values, row_acc, tile.num_groups)
                    with T.sblock("row_of_acc"):
                        T.reads(row_acc[0, vrow, 0:dim])
                        T.writes(tile_acc[0, vrow, 0:dim])
                        for d in range(dim):
                            with T.sblock("row_output"):
                                vd = T.axis.spatial(dim, d)
                                tile_acc[0, vrow, vd] = row_acc[0, vrow, vd]
            with T.sblock("apart_fold"):
                T.reads(tile_acc[0, 0:rows, 0:dim], factors.running[0, 0:rows], factors.added[0, 0:rows])
                T.writes(running.acc[running.slot, 0:rows, 0:dim])
                fold_apart(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage


def _products(spec: PagedAttentionSpec, tiling: Tiling, few: bool) -> Callable[..., None]:
    """The sblock whole_products: the sums over num_groups token groups, each folded as soon as it is known.

    few: few_whole_products, of the first few_rows rows alone.
    """
    of, rows = ("few_", tiling.few_rows) if few else ("", tiling.row_tile)
    dim, pairs = spec.result_dim, tiling.padded_kv_tile // 2
    sums, fold_stage = _sums(spec, tiling, f"{of}whole", rows), state.fold(1, rows, dim, of)

    @inline
    def stage(weights, values, num_groups, factors, running, step, num_steps):
        with T.sblock(f"{of}whole_products"):
            T.reads(
                weights[0, 0:rows, 0:pairs],
                values[0:pairs, 0:dim],
                factors.running[0, 0:rows],
                factors.added[0, 0:rows],
            )
            T.writes(running.acc[running.slot, 0:rows, 0:dim])
            tile_acc = T.sblock_alloc_buffer((1, rows, dim), "float32")
            sums(weights, values, tile_acc, num_groups)
            fold_stage(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage


def _products_apart(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The sblock apart_products: acc[0, r, d] of all rows, the sum over num_groups token groups."""
    rows, dim, pairs = tiling.row_tile, spec.result_dim, tiling.padded_kv_tile // 2
    sums = _sums(spec, tiling, "apart", rows)

    @inline
    def stage(weights, values, acc, num_groups):
        with T.sblock("apart_products"):
            T.reads(weights[0, 0:rows, 0:pairs], values[0:pairs, 0:dim])
            T.writes(acc[0, 0:rows, 0:dim])
            sums(weights, values, acc, num_groups)

    return stage


def _sums(spec: PagedAttentionSpec, tiling: Tiling, of: str, rows: int) -> Callable[..., None]:
    """acc[0, r, d] of so many rows, the sum over num_groups token groups, in the caller's sblock."""
    dim, pairs, group = spec.result_dim, tiling.padded_kv_tile // 2, tiling.token_group // 2

    @inline
    def stage(weights, values, acc, num_groups):
        for to, d, r, ti in T.grid(num_groups, dim, rows, group):
            with T.sblock(f"{of}_sum"):
                vd, vr = T.axis.remap("SS", [d, r])
                vt = T.axis.reduce(pairs, to * group + ti)
                with T.init():
                    acc[0, vr, vd] = T.float32(0)
                acc[0, vr, vd] = acc[0, vr, vd] + dot_pairs(weights[0, vr, vt], values[vt, vd])

    return stage
