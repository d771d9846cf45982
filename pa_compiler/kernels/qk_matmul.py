"""Stage 1: scores = query tile @ key tile^T. And the query tile itself."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.cache_slot import cache_slot
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling


def load_query(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """q_tile[:, r] = float32(query[seq, head_start + r, :]) for r < num_rows, 0 in the rows that pad the tile."""
    rows, head_dim = tiling.row_tile, spec.head_dim

    @T.inline
    def stage(query, q_tile, seq, head_start, num_rows):
        with T.sblock("load_query"):
            for d, r in T.grid(head_dim, rows):
                with T.sblock("q_tile"):
                    vr, vd = T.axis.remap("SS", [r, d])
                    q_tile[vd, vr] = T.if_then_else(
                        vr < num_rows, T.Cast("float32", query[seq, head_start + vr, vd]), T.float32(0)
                    )

    return stage


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """scores[slot, t, r] = sum over d of q_tile[d, r] * key of token tile_start + t, for t < valid_len.

    Tokens are visited in groups of token_group. The last group is filled up by reading its last valid token again:
    no slot at or past valid_len is read, and the scores there are finite wherever the valid ones are.
    """
    rows, head_dim, group = tiling.row_tile, spec.head_dim, tiling.token_group
    tokens = tiling.padded_kv_tile
    locate = cache_slot(spec, tiling)

    @T.inline
    def stage(key_cache, block_table, q_tile, scores, seq, slot, kv_head, tile_start, valid_len):
        with T.sblock("qk_matmul"):
            T.reads(
                key_cache[0 : key_cache.shape[0], 0 : spec.block_size, kv_head, 0:head_dim],
                block_table[seq, 0 : block_table.shape[1]],
                q_tile[0:head_dim, 0:rows],
            )
            T.writes(scores[slot, 0:tokens, 0:rows])
            k_tile = T.sblock_alloc_buffer((tokens, head_dim), "float32")
            for to, ti, d in T.grid(T.ceildiv(valid_len, group), group, head_dim):
                with T.sblock("k_tile"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vd = T.axis.spatial(head_dim, d)
                    T.reads(
                        key_cache[0 : key_cache.shape[0], 0 : spec.block_size, kv_head, vd],
                        block_table[seq, 0 : block_table.shape[1]],
                    )
                    T.writes(k_tile[vt, vd])
                    where = T.meta_var(locate(block_table, seq, tile_start, T.min(vt, valid_len - 1)))
                    k_tile[vt, vd] = T.Cast("float32", key_cache[where[0], where[1], kv_head, vd])
            for to, ti, r, d in T.grid(T.ceildiv(valid_len, group), group, rows, head_dim):
                with T.sblock("scores"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vr, vd = T.axis.remap("SR", [r, d])
                    with T.init():
                        scores[slot, vt, vr] = T.float32(0)
                    scores[slot, vt, vr] += q_tile[vd, vr] * k_tile[vt, vd]

    return stage
