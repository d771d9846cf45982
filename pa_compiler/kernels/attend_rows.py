"""The tiles of rows of a work item of attend: through the four stages, from scores to outputs, and to results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler import tvmscript as script
from pa_compiler.kernels import state
from pa_compiler.kernels.computed import allocate_visible, compute_visible
from pa_compiler.kernels.integers import allocate_units
from pa_compiler.kernels.pv_in_place import update_in_place
from pa_compiler.kernels.pv_matmul import pv_matmul
from pa_compiler.kernels.pv_whole import pv_whole
from pa_compiler.kernels.qk_matmul import qk_matmul
from pa_compiler.kernels.rows import OfRows, TokenRows, by_rows
from pa_compiler.kernels.scales import weigh_factors, weigh_values
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.scores import Scoring
from pa_compiler.kernels.sight import LAST_BEGIN, LEAST_LIMIT, LIMIT, Bounds, Sight, Tree, find_edges
from pa_compiler.kernels.softmax import pair_probs, softmax_prepare
from pa_compiler.kernels.softmax_whole import softmax_whole
from pa_compiler.kernels.state import Factors, State
from pa_compiler.kernels.zero_points import allocate_sums, sum_zeros
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


class Item(NamedTuple):
    """What all stages of a work item have in common: its rows, what they see, and what their scores depend on."""

    seq: Expr
    token: Expr
    num_tokens: Expr
    kv_head_begin: Expr
    num_kv_heads: Expr
    head_tiles: Expr
    scale: Expr
    bounds: Bounds
    tree: Tree
    slopes: Buffer | None
    sums: Buffer | None = None
    units: Buffer | None = None


def rows_of_item(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[[Item, Expr], TokenRows]:
    """(item, tile) -> the rows of one of its tiles."""
    rows, group = tiling.row_tile, spec.group

    def rows_of(item: Item, tile: Expr) -> TokenRows:
        first_pair = T.floormod(tile, item.head_tiles) * rows
        first_head = (item.kv_head_begin + T.floordiv(tile, item.head_tiles)) * group
        num = T.min(item.num_tokens * group - first_pair, rows)
        return TokenRows(item.token, item.num_tokens, first_head, group, first_pair, num)

    return rows_of


def attend_rows(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The four stages for one tile of rows."""
    rows, tokens, terms = tiling.row_tile, tiling.padded_kv_tile, tiling.values.terms
    in_pairs, rows_of = terms == 2, rows_of_item(spec, tiling)
    qk_stage = by_rows(tiling, lambda few: qk_matmul(spec, tiling, few))
    in_whole = tiling.in_tile_registers and tiling.copy_values
    if tiling.value_pairs:
        update_stage = _pv_update_in_place(spec, tiling)
    elif in_whole:
        update_stage = _pv_update_whole(spec, tiling)
    else:
        update_stage = by_rows(tiling, lambda few: _pv_update(spec, tiling, few))
    softmax_stage = softmax_whole(spec, tiling) if in_whole else softmax_prepare(spec, tiling)
    rescale_stage = state.rescale(rows)
    functions = ScoreFunctions(spec, many_tokens=True)
    of_tokens, of_tiles = spec.token_scales, tiling.scales_tiles(spec)
    weigh_stage, factors_stage, pairs_stage = weigh_values(tiling), weigh_factors(rows), pair_probs(tiling)
    zeros_stage, visible_stage, edges_stage = sum_zeros(tiling), compute_visible(functions, tiling), find_edges(tiling)

    def full_groups(tile):
        """Token groups that all rows see whole, but for what a tree or a mask hides."""
        least = T.min(tile.sight.reach(LEAST_LIMIT) - tile.start, tile.valid_len)
        tree = tile.sight.tree
        least = T.Select(tree.present, T.min(least, tree.first - tile.start), least)
        count = T.floordiv(T.max(least, 0), tiling.token_group)
        if tile.sight.bounds.begins is None:
            return count
        return T.Select(tile.sight.reach(LAST_BEGIN) <= tile.start, count, 0)

    @script.inline
    def stage(
        q_tile,
        first,
        keys,
        key_head,
        values,
        value_head,
        whole,
        running,
        step,
        num_steps,
        item,
        given,
        infinite,
        of_head,
    ):
        scores = T.sblock_alloc_buffer((1, rows, tokens), tiling.keys.sum_dtype)
        if not in_whole:
            probs = T.sblock_alloc_buffer((1, rows, tokens), "float32")
        tile_max = T.sblock_alloc_buffer((1, rows), "float32")
        tile_sum = T.sblock_alloc_buffer((1, rows), "float32")
        alpha = T.sblock_alloc_buffer((1, rows), "float32")
        beta = T.sblock_alloc_buffer((1, rows), "float32")
        edges = T.sblock_alloc_buffer((rows, tokens // terms), "int32")
        of = T.meta_var(rows_of(item, first))
        sight = T.meta_var(Sight(item.bounds, first, of, item.tree))
        valid_len: T.let = script.opaque(T.min(whole.valid_len, sight.reach(LIMIT) - whole.start))
        tile = T.meta_var(whole._replace(valid_len=valid_len, sight=sight))
        num_rows: T.let = script.opaque(of.num)
        num_full: T.let = script.opaque(full_groups(tile))
        qk_stage(num_rows, q_tile, first, keys, key_head, tile, scores, 0)
        if in_pairs:
            prob_pairs = T.sblock_alloc_buffer((1, rows, tokens // 2), "int32")
        if of_tokens:
            weighted = T.sblock_alloc_buffer((1, rows, tokens), "float32")
        weight_units = T.meta_var(allocate_units(tiling, "weight_units", 1))
        if of_tiles:
            weighted_beta = T.sblock_alloc_buffer((1, rows), "float32")
        zeros = T.meta_var(allocate_sums(spec, "zero_sums", 1, rows))
        if not in_whole:
            exact = T.meta_var(weighted if of_tokens else probs)
        weights = T.meta_var(prob_pairs if in_pairs else exact)
        query_pos = T.meta_var(OfRows(item.bounds.positions, first))
        computed = T.meta_var(allocate_visible(functions, tiling, given and given._replace(query_pos=query_pos), 1))
        added = T.meta_var(State(tile_max, tile_sum, None, 0))
        scoring = T.meta_var(Scoring(of, query_pos, item.slopes, computed, *of_head.of_slot(first)))
        visible_stage(computed, of, 0, tile.num_groups)
        softmax_stage(
            scores, *([] if in_whole else [probs]), added, of_head.score, item.bounds.headroom(first), tile,
            tile.num_groups, scoring, weights if in_pairs and not of_tokens else None, num_full,
            *([num_rows] if in_whole else []),
        )  # fmt: skip
        weigh_stage(probs if of_tokens else None, weighted if of_tokens else None, of_head, 0, tile.num_groups)
        zeros_stage(None if in_whole else probs, zeros, of_head, 0, tile.num_groups)
        if of_tokens and in_pairs:
            pairs_stage(exact, weights, tile_sum, 0, tile.num_groups, weight_units)
        rescale_stage(added, running, Factors(alpha, beta, 0), step)
        factors_stage(Factors(alpha, beta, 0), weighted_beta if of_tiles else None, of_head, weight_units)
        if not in_whole:
            edges_stage(edges, tile, num_full)
        update_stage(
            num_rows, weights, values, value_head, tile, num_full, computed, edges,
            Factors(alpha, weighted_beta if of_tiles else beta, 0, zeros),
            running._replace(slot=first), step, num_steps, *([] if infinite is None else [infinite]),
        )  # fmt: skip

    return stage


def _pv_update(spec: PagedAttentionSpec, tiling: Tiling, few: bool) -> Callable[..., None]:
    """The outputs of one tile of rows, and their fold into the running state."""
    rows, of, dim = tiling.few_rows if few else tiling.row_tile, "few_" if few else "", spec.result_dim
    pv_stage, fold_stage = pv_matmul(spec, tiling, few), state.fold(1, rows, dim, of)

    @script.inline
    def stage(weights, values, value_head, tile, num_full, computed, edges, factors, running, step, num_steps):
        with T.sblock(f"{of}pv_update"):
            T.reads()
            T.writes()
            tile_acc = T.sblock_alloc_buffer((1, rows, dim), tiling.values.sum_dtype)
            pv_stage(weights, values, value_head, tile, num_full, tile_acc, 0, computed, edges)
            fold_stage(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage


def _pv_update_in_place(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The same of values that a matrix unit multiplies as they lie in the cache."""
    in_place = update_in_place(spec, tiling)

    @script.inline
    def stage(
        num_rows, weights, values, value_head, tile, num_full, computed, edges, factors, running, step, num_steps
    ):
        in_place(weights, values, value_head, tile, factors, running, step, num_steps, computed, num_full, edges)

    return stage


def _pv_update_whole(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The same by whole tiles of values, of which infinite says whether some are not finite."""
    pv_stage = pv_whole(spec, tiling)

    @script.inline
    def stage(
        num_rows,
        weights,
        values,
        value_head,
        tile,
        num_full,
        computed,
        edges,
        factors,
        running,
        step,
        num_steps,
        infinite,
    ):
        with T.sblock("pv_update"):
            T.reads()
            T.writes()
            pv_stage(
                num_rows,
                weights,
                values.memory,
                infinite,
                tile,
                num_full,
                computed,
                edges,
                factors,
                running,
                step,
                num_steps,
            )

    return stage


def finish_item(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """out and lse of the item's tokens, or their partial results."""
    rows_of = rows_of_item(spec, tiling)
    normalize_stage = state.normalize(spec, tiling.row_tile, many_tokens=True)
    store_stage = state.store(tiling.row_tile, spec.result_dim)

    @script.inline
    def stage(total, partial, is_whole, out, lse, item, num_tiles, sinks):
        for tile in range(num_tiles):
            with T.sblock("result"):
                vtile = T.axis.spatial(num_tiles, tile)
                T.reads()
                T.writes()
                result = T.meta_var(total._replace(slot=vtile))
                of = T.meta_var(rows_of(item, vtile))
                if is_whole:
                    normalize_stage(result, out, lse, of, item.bounds.headroom(vtile), sinks)
                else:
                    store_stage(result, partial, of)

    return stage
