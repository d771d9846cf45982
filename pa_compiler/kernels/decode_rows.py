"""The rows of a sequence in decode: their queries before the first tile of keys, and their results at the end."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler import tvmscript as script
from pa_compiler.kernels import state
from pa_compiler.kernels.fours import place_of
from pa_compiler.kernels.load_query import load_query
from pa_compiler.kernels.rows import rows_of_tiles
from pa_compiler.kernels.zero_points import sum_queries
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def load_queries(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The query rows of all head tiles of a sequence, and their sums and units, where there is room for these."""
    tiles, rows_of = spec.num_kv_heads * tiling.row_tiles(spec), rows_of_tiles(spec, tiling)
    load_query_stage, sum_stage = load_query(spec, tiling), sum_queries(spec, tiling)

    @script.inline
    def stage(query, q_tile, sums, seq, query_scale, units):
        for tile in range(tiles):
            with T.sblock("query_tile"):
                vtile = T.axis.spatial(tiles, tile)
                T.reads()
                T.writes()
                load_query_stage(query, q_tile, vtile, rows_of(seq, vtile), query_scale, units)
                sum_stage(q_tile, sums, vtile, units)

    return stage


def finish_rows(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """out and lse of a sequence that is whole, or its partial result."""
    tiles, rows_of = spec.num_kv_heads * tiling.row_tiles(spec), rows_of_tiles(spec, tiling)
    normalize_stage = state.normalize(spec, tiling.row_tile)
    store_stage = state.store(tiling.row_tile, spec.result_dim)
    place = place_of(tiling.values.turned) if tiling.values.turned else None

    @script.inline
    def stage(running, partial, is_whole, out, lse, seq, places, sinks):
        for tile in range(tiles):
            with T.sblock("result"):
                vtile = T.axis.spatial(tiles, tile)
                T.reads()
                T.writes()
                result = T.meta_var(running._replace(slot=vtile, place=place))
                if is_whole:
                    normalize_stage(result, out, lse, rows_of(seq, vtile), places, sinks)
                else:
                    store_stage(result, partial, rows_of(seq, vtile))

    return stage
