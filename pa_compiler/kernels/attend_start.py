"""Before the first tile of keys of a work item of attend: its rows, what they see, and their empty states."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler import tvmscript as script
from pa_compiler.kernels.attend_rows import rows_of_item
from pa_compiler.kernels.load_query import load_query
from pa_compiler.kernels.sight import BEGIN, LEAST_LIMIT, LIMIT, find_bounds
from pa_compiler.kernels.state import EMPTY_ROW_MAX
from pa_compiler.kernels.zero_points import sum_queries
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def start_rows(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The query rows of all tiles, what they see, and empty states; and from where up to where one of them sees."""
    rows, dim, rows_of = tiling.row_tile, spec.result_dim, rows_of_item(spec, tiling)
    load_query_stage, bounds_stage = load_query(spec, tiling), find_bounds(spec, tiling)
    sum_stage = sum_queries(spec, tiling)

    @script.inline
    def stage(query, q_tile, item, num_tiles, token_positions, context_len, sees_all, query_scale, total, span):
        for tile in range(num_tiles):
            with T.sblock("query_tile"):
                vtile = T.axis.spatial(num_tiles, tile)
                T.reads()
                T.writes()
                of = T.meta_var(rows_of(item, vtile))
                load_query_stage(query, q_tile, vtile, of, query_scale, item.units)
                sum_stage(q_tile, item.sums, vtile)
                bounds_stage(item.bounds, vtile, of, token_positions, context_len, sees_all)
                with T.sblock("empty_state"):
                    T.reads()
                    T.writes(
                        total.row_max[vtile, 0:rows], total.row_sum[vtile, 0:rows], total.acc[vtile, 0:rows, 0:dim]
                    )
                    for r in range(rows):
                        with T.sblock("empty_row"):
                            vr = T.axis.spatial(rows, r)
                            total.row_max[vtile, vr] = T.float32(EMPTY_ROW_MAX)
                            total.row_sum[vtile, vr] = T.float32(0)
                    for r, d in T.grid(rows, dim):
                        with T.sblock("empty_acc"):
                            vr, vd = T.axis.remap("SS", [r, d])
                            total.acc[vtile, vr, vd] = T.float32(0)
        reach = T.meta_var(item.bounds.reach)
        for tile in range(num_tiles):
            with T.sblock("span"):
                vtile = T.axis.opaque(num_tiles, tile)
                T.reads(reach[vtile, 0:4])
                T.writes(span[0:3])
                span[0] = T.Select(vtile == 0, reach[vtile, BEGIN], T.min(span[0], reach[vtile, BEGIN]))
                span[1] = T.Select(vtile == 0, reach[vtile, LIMIT], T.max(span[1], reach[vtile, LIMIT]))
                span[2] = T.Select(vtile == 0, reach[vtile, LEAST_LIMIT], T.min(span[2], reach[vtile, LEAST_LIMIT]))

    return stage
