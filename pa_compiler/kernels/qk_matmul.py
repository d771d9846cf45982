"""Stage 1: scores = query tile @ key tile^T. And the query tile itself."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.cache_access import element, key_access, prefetch, whole
from pa_compiler.kernels.inline import inline
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling


def load_query(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """q_tile[tile, r, :] = float32(query[seq, head_start + r, :]) for r < num_rows, 0 in the rows that pad the tile."""
    rows, head_dim = tiling.row_tile, spec.head_dim

    @inline
    def stage(query, q_tile, seq, tile, head_start, num_rows):
        with T.sblock("load_query"):
            T.reads(query[seq, head_start : head_start + num_rows, 0:head_dim])
            T.writes(q_tile[tile, 0:rows, 0:head_dim])
            for r, d in T.grid(rows, head_dim):
                with T.sblock("q_tile"):
                    vr, vd = T.axis.remap("SS", [r, d])
                    q_tile[tile, vr, vd] = T.if_then_else(
                        vr < num_rows, T.Cast("float32", query[seq, head_start + vr, vd]), T.float32(0)
                    )

    return stage


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """scores[slot, r, t] = sum over d of q_tile[tile, r, d] * key of token t, for t < valid_len.

    Tokens are visited in groups of token_group. The last group is filled up with tokens of the same sequence, whose
    scores are finite wherever the valid ones are; or, packed, with lanes of the same block, whose scores mean nothing.

    keys is what is multiplied: key_cache, or a tile of it that was converted. On the way the tile that comes next, of
    the tokens from ahead_t on at ahead_offset, is fetched from key_cache.
    """
    rows, head_dim, group = tiling.row_tile, spec.head_dim, tiling.token_group
    tokens, offsets = tiling.padded_kv_tile, tiling.num_offsets
    access = key_access(spec, tiling)
    load, fetches = element(tiling, access), group * access.num_lines

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
        row_stride,
        ahead_t,
        ahead_offset,
        valid_len,
    ):
        with T.sblock("qk_matmul"):
            T.reads(q_tile[tile, 0:rows, 0:head_dim], whole(keys), whole(key_cache), key_offsets[0:offsets])
            T.writes(scores[slot, 0:rows, 0:tokens])
            for to, n in T.grid(T.ceildiv(valid_len, group), fetches):
                with T.sblock("prefetch_keys"):
                    vo = T.axis.spatial(tokens // group, to)
                    vn = T.axis.spatial(fetches, n)
                    T.reads(key_offsets[0:offsets])
                    T.writes()
                    number: T.let = ahead_t * access.num_lines + vo * fetches + vn
                    T.evaluate(prefetch(key_cache, access.line(key_offsets, number, ahead_offset, row_stride)))
            for to, ti, r, d in T.grid(T.ceildiv(valid_len, group), group, rows, head_dim):
                with T.sblock("scores"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr, vd = T.axis.remap("SR", [r, d])
                    with T.init():
                        scores[slot, vr, vt] = T.float32(0)
                    scores[slot, vr, vt] += q_tile[tile, vr, vd] * load(
                        keys, key_offsets, vt, head_offset, row_stride, vd
                    )

    return stage
