"""Before the stages: the query rows of a head tile, as qk_matmul multiplies them."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.caches import elements_of_operand
from pa_compiler.kernels.elements import pair_floats
from pa_compiler.kernels.headroom import scaled
from pa_compiler.kernels.integers import QUERY_GROUP, to_integers
from pa_compiler.kernels.rotation import rotate, unit
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import TILE_ROWS, Tiling
from pa_compiler.tvmscript import inline


def query_shape(spec: PagedAttentionSpec, tiling: Tiling, tiles: int) -> tuple[int, int, int]:
    """The shape of load_query's q_tile of so many tiles."""
    depth = spec.head_dim // tiling.keys.terms
    return (tiles, depth, TILE_ROWS) if tiling.rows_in_place else (tiles, tiling.row_tile, depth)


def load_query(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """q_tile[tile, r, :] = query_scale * query of row r, for the rows that there are; 0 in rows that pad the tile.

    In float32, and of float16 without query_scale (headroom.scaled). Where pairs are multiplied, q_tile[tile, r, d] is
    the word of the two elements that are a pair of a key, CacheAccess.pair, instead; with Tiling.rows_in_place it is
    q_tile[tile, d, r]. Where keys are rotated before they become codes, the queries are too, which are float32 then.
    Of integers the numbers are units[tile, r] times these (integers.py).
    """
    capacity, head_dim, depth = tiling.row_tile, spec.head_dim, spec.head_dim // tiling.keys.terms
    turned = tiling.rows_in_place

    def of_pair(d):
        return elements_of_operand(tiling.keys, head_dim, d)

    convert = to_integers(tiling.keys, "query", "q_tile", capacity, head_dim, QUERY_GROUP, of_pair)

    def element(x, query_scale):
        return scaled(spec, T.Cast("float32", x), query_scale)

    def of_row(query, rows, row, d, query_scale):
        return T.if_then_else(row < rows.num, element(query[rows.at(row, d)], query_scale), T.float32(0))

    @inline
    def stage(query, q_tile, tile, rows, query_scale, units=None):
        with T.sblock("load_query"):
            T.reads(query[rows.all(slice(0, head_dim))])
            T.writes(
                q_tile[tile, 0:depth, 0:capacity] if turned else q_tile[tile, 0:capacity, 0:depth],
                *([] if units is None else [units[tile, 0:capacity]]),
            )
            if spec.rotates:
                given = T.meta_var([query[rows.all(slice(0, head_dim))]])
                numbers = T.meta_var(lambda row, d: (of_row(query, rows, row, d, query_scale), given))
                rotated = T.meta_var(rotate("query", numbers, capacity, head_dim))
            if tiling.keys.integers > 0:
                exact = T.sblock_alloc_buffer((capacity, head_dim), "float32")
                for r, d in T.grid(capacity, head_dim):
                    with T.sblock("query_number"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        exact[vr, vd] = (
                            of_row(query, rows, vr, vd, query_scale)
                            if not spec.rotates
                            else rotated[vr, vd] * T.float32(unit(head_dim))
                        )
                convert(lambda r, d: exact[r, d], q_tile, units, tile, head_dim // QUERY_GROUP)
            elif tiling.keys.terms == 2:
                for r, d in T.grid(capacity, depth):
                    with T.sblock("q_tile"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        q_tile[(tile, vd, vr) if turned else (tile, vr, vd)] = T.if_then_else(
                            vr < rows.num,
                            pair_floats(
                                element(query[rows.at(vr, of_pair(vd)[0])], query_scale),
                                element(query[rows.at(vr, of_pair(vd)[1])], query_scale),
                            ),
                            0,
                        )
            else:
                for r, d in T.grid(capacity, head_dim):
                    with T.sblock("q_tile"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        q_tile[tile, vr, vd] = (
                            of_row(query, rows, vr, vd, query_scale)
                            if not spec.rotates
                            else rotated[vr, vd] * T.float32(unit(head_dim))
                        )

    return stage
