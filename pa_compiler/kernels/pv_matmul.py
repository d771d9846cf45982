"""Stage 3: tile_acc = probs @ value tile."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.cache_slot import cache_slot
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling


def pv_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_acc[slot, d, r] = sum over t < valid_len of probs[slot, t, r] * value of token tile_start + t.

    The sum stops at valid_len: values in unused slots are not multiplied by 0, they are not read.
    """
    rows, head_dim, tokens = tiling.row_tile, spec.head_dim, tiling.padded_kv_tile
    locate = cache_slot(spec, tiling)

    @T.inline
    def stage(value_cache, block_table, probs, tile_acc, seq, slot, kv_head, tile_start, valid_len):
        with T.sblock("pv_matmul"):
            T.reads(
                value_cache[0 : value_cache.shape[0], 0 : spec.block_size, kv_head, 0:head_dim],
                block_table[seq, 0 : block_table.shape[1]],
                probs[slot, 0:tokens, 0:rows],
            )
            T.writes(tile_acc[slot, 0:head_dim, 0:rows])
            v_tile = T.sblock_alloc_buffer((tokens, head_dim), "float32")
            for t, d in T.grid(valid_len, head_dim):
                with T.sblock("v_tile"):
                    vt = T.axis.spatial(tokens, t)
                    vd = T.axis.spatial(head_dim, d)
                    T.reads(
                        value_cache[0 : value_cache.shape[0], 0 : spec.block_size, kv_head, vd],
                        block_table[seq, 0 : block_table.shape[1]],
                    )
                    T.writes(v_tile[vt, vd])
                    where = T.meta_var(locate(block_table, seq, tile_start, vt))
                    v_tile[vt, vd] = T.Cast("float32", value_cache[where[0], where[1], kv_head, vd])
            for t, r, d in T.grid(valid_len, rows, head_dim):
                with T.sblock("tile_acc"):
                    vt = T.axis.reduce(tokens, t)
                    vr, vd = T.axis.remap("SS", [r, d])
                    with T.init():
                        tile_acc[slot, vd, vr] = T.float32(0)
                    tile_acc[slot, vd, vr] += probs[slot, vt, vr] * v_tile[vt, vd]

    return stage
