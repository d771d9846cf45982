"""Sums of values that a matrix unit multiplies in rows of tokens as they lie in the cache: part of rows_in_place.py."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.caches import rows_from, value_access
from pa_compiler.kernels.elements import dot_pairs
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import TILE_ROWS, TILE_TOKENS, Tiling
from pa_compiler.tvmscript import inline


def weight_rows(tiling: Tiling) -> int:
    """Rows of a head tile's weights, two for each of its own, in whole tiles."""
    return -(-2 * tiling.row_tile // TILE_ROWS) * TILE_ROWS


def add_up(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """acc[i, m, w] = sum over t of dot_pairs(weights[i, m, t], word w of the value of the token in column t).

    In the caller's sblock, for all head tiles i, and all token groups that hold tokens in their order, in passes over
    value_dims elements. In a sweep a token group is gone through with all head tiles before the next one.
    """
    return (_swept_sums if tiling.sweep else _sums)(spec, tiling)


def _sums(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """Of one head tile: the sums of a pass stay in registers from the first token group to the last."""
    num_rows, width, passes = weight_rows(tiling), tiling.value_dims // 2, spec.result_dim // tiling.value_dims
    clear_stage, add_stage, store_stage = _clear(spec, tiling), _add_group(spec, tiling), _store(spec, tiling)

    @inline
    def stage(weights, values, head_offset, tile, acc):
        sums = T.sblock_alloc_buffer((num_rows, width), "float32")
        for p in range(passes):
            clear_stage(sums, p)
            for to in range(tile.num_groups):
                add_stage(weights, values, head_offset, tile, sums, 0, p, to)
            store_stage(sums, acc, 0, p)

    return stage


def _swept_sums(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """Of all head tiles: sums lie in acc between two token groups."""
    num_rows, width, passes = weight_rows(tiling), tiling.value_dims // 2, spec.result_dim // tiling.value_dims
    num_tiles = tiling.pass_tiles(spec)
    clear_stage, add_stage, store_stage = _clear(spec, tiling), _add_group(spec, tiling), _store(spec, tiling)

    @inline
    def stage(weights, values, head_offset, tile, acc):
        sums = T.sblock_alloc_buffer((num_rows, width), "float32")
        for to in range(tile.num_groups):
            for i in range(num_tiles):
                for p in range(passes):
                    if to == 0:
                        clear_stage(sums, p)
                    else:
                        with T.sblock("load_sums"):
                            vi, vp = T.axis.remap("SS", [i, p])
                            T.reads(acc[vi, 0:num_rows, vp * width : vp * width + width])
                            T.writes(sums[0:num_rows, 0:width])
                            for m, w in T.grid(num_rows, width):
                                with T.sblock("loaded_sum"):
                                    vm, vw = T.axis.remap("SS", [m, w])
                                    sums[vm, vw] = acc[vi, vm, vp * width + vw]
                    add_stage(weights, values, head_offset, tile, sums, i, p, to)
                    store_stage(sums, acc, i, p)

    return stage


def _clear(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """sums of pass p = 0."""
    num_rows, width, passes = weight_rows(tiling), tiling.value_dims // 2, spec.result_dim // tiling.value_dims

    @inline
    def stage(sums, p):
        with T.sblock("clear_sums"):
            vp = T.axis.spatial(passes, p)
            T.reads()
            T.writes(sums[0:num_rows, 0:width])
            for m, w in T.grid(num_rows, width):
                with T.sblock("no_sum"):
                    vm, vw = T.axis.remap("SS", [m, w])
                    sums[vm, vw] = T.float32(0)

    return stage


def _store(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """acc of head tile i = sums of pass p."""
    num_rows, width, passes = weight_rows(tiling), tiling.value_dims // 2, spec.result_dim // tiling.value_dims
    num_tiles = tiling.pass_tiles(spec)

    @inline
    def stage(sums, acc, i, p):
        with T.sblock("store_sums"):
            vi, vp = T.axis.spatial(num_tiles, i), T.axis.spatial(passes, p)
            T.reads(sums[0:num_rows, 0:width])
            T.writes(acc[vi, 0:num_rows, vp * width : vp * width + width])
            for m, w in T.grid(num_rows, width):
                with T.sblock("stored_sum"):
                    vm, vw = T.axis.remap("SS", [m, w])
                    acc[vi, vm, vp * width + vw] = sums[vm, vw]

    return stage


def _add_group(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """Add to sums, of pass p, what there is of token group `to`, with the weights of head tile i."""
    num_rows, width, group = weight_rows(tiling), tiling.value_dims // 2, tiling.token_group
    tokens, steps, passes = tiling.padded_kv_tile, group // TILE_TOKENS, spec.result_dim // tiling.value_dims
    read, num_tiles, group_tiles = value_access(spec, tiling).pair, tiling.pass_tiles(spec), tiling.row_tiles(spec)

    def is_whole(tile, to):
        """Whether a token group holds nothing but tokens that are seen."""
        holds = to * group + group <= tile.valid_len
        return holds if tile.first_seen is None else T.And(holds, tile.sees(to * group))

    def seen(tile, word, column):
        sees = column < tile.valid_len
        return T.Select(sees if tile.first_seen is None else T.And(sees, tile.sees(column)), word, T.int32(0))

    @inline
    def stage(weights, values, head_offset, tile, sums, i, p, to):
        if is_whole(tile, to):
            for s, m, w, k in T.grid(steps, num_rows, width, TILE_TOKENS):
                with T.sblock("whole_sum"):
                    vi, vp = T.axis.spatial(num_tiles, i), T.axis.spatial(passes, p)
                    vs = T.axis.reduce(tokens // TILE_TOKENS, to * steps + s)
                    vm, vw, vk = T.axis.remap("SSR", [m, w, k])
                    now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * values.head)
                    sums[vm, vw] = sums[vm, vw] + dot_pairs(
                        weights[vi, vm, vs * TILE_TOKENS + vk],
                        rows_from(values, vs * TILE_TOKENS, vk, now, vp * width + vw),
                    )
        else:
            with T.sblock("edge_group"):
                vi, vp = T.axis.spatial(num_tiles, i), T.axis.spatial(passes, p)
                vto = T.axis.opaque(tokens // group, to)
                T.reads()
                T.writes()
                edge = T.sblock_alloc_buffer((group, width), "int32")
                now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * values.head)
                for ti, w in T.grid(group, width):
                    with T.sblock("edge_value"):
                        vt, vw = T.axis.remap("SS", [ti, w])
                        edge[vt, vw] = seen(
                            tile, read(values, vto * group + vt, now, vp * width + vw), vto * group + vt
                        )
                for s, m, w, k in T.grid(steps, num_rows, width, TILE_TOKENS):
                    with T.sblock("edge_sum"):
                        vs = T.axis.reduce(steps, s)
                        vm, vw, vk = T.axis.remap("SSR", [m, w, k])
                        sums[vm, vw] = sums[vm, vw] + dot_pairs(
                            weights[vi, vm, vto * group + vs * TILE_TOKENS + vk], edge[vs * TILE_TOKENS + vk, vw]
                        )

    return stage
