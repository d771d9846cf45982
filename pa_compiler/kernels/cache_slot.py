"""Where a token lies in the paged cache: the one place that turns a position into a block and a slot of it."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling


def cache_slot(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., tuple[Expr, Expr]]:
    """A function (block_table, seq, tile_start, t) -> (block id as int64, slot) of the token tile_start + t of seq.

    The block id is int64 so that its product with a stride is: caches of more than 2**31 elements are ordinary.
    Where whole tiles fit into a block, tile_start is a multiple of kv_tile (item ranges begin at block boundaries), the
    block is the same for all of a tile, and its look-up leaves the loop over t.
    """
    block_size = spec.block_size

    def locate(block_table, seq, tile_start, t):
        if block_size % tiling.kv_tile == 0:
            block_idx, slot = T.floordiv(tile_start, block_size), T.floormod(tile_start, block_size) + t
        else:
            block_idx, slot = T.floordiv(tile_start + t, block_size), T.floormod(tile_start + t, block_size)
        return T.Cast("int64", block_table[seq, block_idx]), slot

    return locate
