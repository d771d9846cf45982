"""Stage 1: scores = query tile @ key tile^T. And the query tile itself."""

import operator
from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.cache_access import key_access, load, load_copied, prefetch, whole
from pa_compiler.kernels.headroom import scaled
from pa_compiler.kernels.pairs import dot_pairs, pair_floats
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


def load_query(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """q_tile[tile, r, :] = query_scale * query[seq, head_start + r, :] for r < num_rows, 0 in rows that pad the tile.

    In float32, and of float16 without query_scale (headroom.scaled).

    Where pairs are multiplied, q_tile[tile, r, d] is the word of the elements 2d and 2d + 1 instead.
    """
    rows, head_dim, depth = tiling.row_tile, spec.head_dim, spec.head_dim // tiling.dot_elements

    def element(x, query_scale):
        return scaled(spec, T.Cast("float32", x), query_scale)

    @inline
    def stage(query, q_tile, seq, tile, head_start, num_rows, query_scale):
        with T.sblock("load_query"):
            T.reads(query[seq, head_start : head_start + num_rows, 0:head_dim])
            T.writes(q_tile[tile, 0:rows, 0:depth])
            if tiling.dot_pairs:
                for r, d in T.grid(rows, depth):
                    with T.sblock("q_tile"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        q_tile[tile, vr, vd] = T.if_then_else(
                            vr < num_rows,
                            pair_floats(
                                element(query[seq, head_start + vr, 2 * vd], query_scale),
                                element(query[seq, head_start + vr, 2 * vd + 1], query_scale),
                            ),
                            0,
                        )
            else:
                for r, d in T.grid(rows, head_dim):
                    with T.sblock("q_tile"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        q_tile[tile, vr, vd] = T.if_then_else(
                            vr < num_rows, element(query[seq, head_start + vr, vd], query_scale), T.float32(0)
                        )

    return stage


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """scores[slot, r, t] = sum over d of q_tile[tile, r, d] * key of token t, for t < valid_len.

    For pass_tiles tiles and slots from tile and slot on; the first of them reads the kv head at head_offset.

    Or of dot_pairs(q_tile[tile, r, d], pair d of that key), which loses nothing: a product of two bfloat16 numbers is
    one of float32. Tokens are visited in groups of token_group. The last group is filled up with tokens of the same
    sequence, whose scores are finite wherever the valid ones are; or, packed, with lanes of the same block, whose
    scores mean nothing.

    keys is what is multiplied: key_cache, or a tile of it that was converted. On the way the tile that comes next, of
    the tokens from ahead_t on at ahead_offset, is fetched from key_cache; not in a sweep.
    """
    rows, depth, group = tiling.row_tile, spec.head_dim // tiling.dot_elements, tiling.token_group
    tokens, offsets = tiling.padded_kv_tile, tiling.num_offsets
    one_tile = tiling.sweep is None
    num_tiles, group_tiles = tiling.pass_tiles(spec), tiling.row_tiles(spec)
    access = key_access(spec, tiling)
    read, fetches = load_copied if tiling.copy_keys else load(tiling, access), group * access.num_lines
    product = dot_pairs if tiling.dot_pairs else operator.mul

    @inline
    def stage(
        q_tile,
        keys,
        key_cache,
        key_offsets,
        scores,
        tile,
        slot,
        head_offset,
        head_stride,
        row_stride,
        ahead_t,
        ahead_offset,
        valid_len,
    ):
        with T.sblock("qk_matmul"):
            T.reads(
                q_tile[tile : tile + num_tiles, 0:rows, 0:depth],
                whole(keys),
                whole(key_cache),
                key_offsets[0:offsets],
            )
            T.writes(scores[slot : slot + num_tiles, 0:rows, 0:tokens])
            if tiling.prefetches:
                for _, to, n in T.grid(num_tiles, T.ceildiv(valid_len, group), fetches):
                    with T.sblock("prefetch_keys"):
                        vo = T.axis.spatial(tokens // group, to)
                        vn = T.axis.spatial(fetches, n)
                        T.reads(key_offsets[0:offsets])
                        T.writes()
                        first: T.let = ahead_t + vo * group
                        T.evaluate(prefetch(key_cache, access.line(key_offsets, first, vn, ahead_offset, row_stride)))
            for i, to, ti, r, d in T.grid(num_tiles, T.ceildiv(valid_len, group), group, rows, depth):
                with T.sblock("scores"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vi, vr, vd = T.axis.remap("SSR", [i, r, d])
                    at = T.meta_var(slot if one_tile else slot + vi)
                    now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * head_stride)
                    with T.init():
                        scores[at, vr, vt] = T.float32(0)
                    scores[at, vr, vt] += product(
                        q_tile[tile + vi, vr, vd], read(keys, key_offsets, vt, now, row_stride, vd)
                    )

    return stage
