"""The staged pipeline: the four stages as PrimFuncs that the host drives block by block as the seed does, and the end.

Each takes the num_seqs places of one chunk at once (chunk.py). In decode these are the sequences from batch_start on.
With tiles of attend they are query tokens of sequence of_seq, those from token_begin on, the first of which is at
position first_pos; each has a valid length of its own, up to itself or, with sees_all, up to the end of its sequence.
With tree_start >= 0 they see of the tree_size last tokens of it what tree_mask says, as in fused_attend.

The intermediates are float32 and indexed by the place in the chunk: scores and probs [batch_chunk, row_tile, tokens];
tile_max, tile_sum, row_max and row_sum [batch_chunk, row_tile]; tile_acc and acc [batch_chunk, row_tile, value_dim].
tokens is block_size padded to whole token groups. A place whose sequence has ended takes part with valid_len == 0 and
reads nothing.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels import pv_matmul as pv
from pa_compiler.kernels import qk_matmul as qk
from pa_compiler.kernels import softmax, state
from pa_compiler.kernels.arrays import Arrays, without
from pa_compiler.kernels.caches import Cache, key_access, value_access
from pa_compiler.kernels.chunk import Queries, compute_block, look_up, not_taken, place_of, tile_of, valid_tokens
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.load_query import load_query
from pa_compiler.kernels.score_functions import ScoreFunctions
from pa_compiler.kernels.scores import Scoring
from pa_compiler.kernels.sight import Tree
from pa_compiler.kernels.state import State
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """scores of block block_idx of every sequence of the chunk, for the heads [head_start, head_start + num_rows).

    As the queries are with query_scale (qk_matmul.load_query).
    """
    arrays = Arrays(spec, tiling)
    load_query_stage, qk_stage = load_query(spec, tiling), qk.qk_matmul(spec, tiling)
    look_up_stage = look_up(spec, tiling, key_access(spec, tiling))

    @script.prim_func(s_tir=True)
    def qk_matmul(
        query_handle: T.handle,
        key_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        scores_handle: T.handle,
        k_block: T.int64,
        k_row: T.int64,
        k_head: T.int64,
        batch_start: T.int32,
        of_seq: T.int32,
        token_begin: T.int32,
        first_pos: T.int32,
        sees_all: T.int32,
        num_seqs: T.int32,
        kv_head: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
        block_idx: T.int32,
        query_scale: T.float32,
    ):
        query = arrays.query(query_handle)
        key_cache = arrays.key_cache(key_cache_handle)
        block_table = arrays.block_table(block_table_handle)
        context_lens = arrays.context_lens(context_lens_handle)
        scores = arrays.scores(scores_handle)
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                q_tile = T.sblock_alloc_buffer((1, tiling.row_tile, spec.head_dim), "float32")
                key_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                queries = T.meta_var(Queries(of_seq, token_begin, first_pos, sees_all))
                place = T.meta_var(place_of(tiling, context_lens, batch_start, vs, queries))
                valid_len: T.let = valid_tokens(spec, place, block_idx)
                tile = T.meta_var(tile_of(spec, tiling, place, block_idx, valid_len))
                keys = T.meta_var(Cache(key_cache, k_block, k_row, k_head, key_offsets))
                head_offset: T.let = T.Cast("int64", kv_head) * k_head
                load_query_stage(query, q_tile, 0, place.rows(head_start, num_rows), query_scale)
                look_up_stage(block_table, keys, tile, place.seq)
                qk_stage(q_tile, 0, keys, head_offset, tile, scores, vs)

    return without(qk_matmul, *not_taken(tiling))


def softmax_prepare(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """probs, tile_max and tile_sum of block block_idx, every column of probs written."""
    arrays, num_groups = Arrays(spec, tiling), tiling.padded_kv_tile // tiling.token_group
    softmax_stage = softmax.softmax_prepare(spec, tiling)
    functions = ScoreFunctions(spec, attends=tiling.attends)
    compute = compute_block(functions, tiling)

    @script.prim_func(s_tir=True)
    def softmax_prepare(
        context_lens_handle: T.handle,
        tree_mask_handle: T.handle,
        scores_handle: T.handle,
        probs_handle: T.handle,
        tile_max_handle: T.handle,
        tile_sum_handle: T.handle,
        alibi_slopes_handle: T.handle,
        batch_start: T.int32,
        of_seq: T.int32,
        token_begin: T.int32,
        first_pos: T.int32,
        sees_all: T.int32,
        tree_start: T.int64,
        tree_size: T.int32,
        num_seqs: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
        block_idx: T.int32,
        score_scale: T.float32,
    ):
        context_lens = arrays.context_lens(context_lens_handle)
        if tiling.attends:
            tree_mask = arrays.tree_mask(tree_mask_handle)
        scores = arrays.scores(scores_handle)
        probs = arrays.scores(probs_handle)
        tile_max = arrays.rows(tile_max_handle)
        tile_sum = arrays.rows(tile_sum_handle)
        if spec.alibi:
            alibi_slopes = arrays.alibi_slopes(alibi_slopes_handle)
        of_functions = T.meta_var(arrays.of_functions(functions.arrays))
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                queries = T.meta_var(Queries(of_seq, token_begin, first_pos, sees_all))
                place = T.meta_var(place_of(tiling, context_lens, batch_start, vs, queries))
                valid_len: T.let = valid_tokens(spec, place, block_idx)
                tile = T.meta_var(tile_of(spec, tiling, place, block_idx, valid_len))
                added = T.meta_var(State(tile_max, tile_sum, None, vs))
                rows = T.meta_var(place.rows(head_start, num_rows))
                tree = T.meta_var(
                    Tree(tree_mask, tree_start, tree_size, context_lens[of_seq] - tree_size) if tiling.attends else None
                )
                computed = T.meta_var(compute(of_functions, place, rows, tile, num_groups, tree))
                scoring = T.meta_var(Scoring(rows, place.query_pos, alibi_slopes if spec.alibi else None, computed))
                places = T.meta_var(headroom(spec, place.length))
                softmax_stage(scores, probs, added, score_scale, places, tile, num_groups, scoring)

    unused = () if spec.alibi or functions.present else ("head_start", "num_rows")
    return without(softmax_prepare, *unused, *not_taken(tiling))


def pv_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """tile_acc of block block_idx of every sequence of the chunk. A mask is computed again."""
    arrays, pv_stage = Arrays(spec, tiling), pv.pv_matmul(spec, tiling)
    functions = ScoreFunctions(spec, only_mask=True, attends=tiling.attends)
    compute = compute_block(functions, tiling)
    look_up_stage = look_up(spec, tiling, value_access(spec, tiling))

    @script.prim_func(s_tir=True)
    def pv_matmul(
        value_cache_handle: T.handle,
        block_table_handle: T.handle,
        context_lens_handle: T.handle,
        tree_mask_handle: T.handle,
        probs_handle: T.handle,
        tile_acc_handle: T.handle,
        v_block: T.int64,
        v_row: T.int64,
        v_head: T.int64,
        batch_start: T.int32,
        of_seq: T.int32,
        token_begin: T.int32,
        first_pos: T.int32,
        sees_all: T.int32,
        tree_start: T.int64,
        tree_size: T.int32,
        num_seqs: T.int32,
        kv_head: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
        block_idx: T.int32,
    ):
        value_cache = arrays.value_cache(value_cache_handle)
        block_table = arrays.block_table(block_table_handle)
        context_lens = arrays.context_lens(context_lens_handle)
        if tiling.attends:
            tree_mask = arrays.tree_mask(tree_mask_handle)
        probs = arrays.scores(probs_handle)
        tile_acc = arrays.acc(tile_acc_handle)
        of_mask = T.meta_var(arrays.of_functions(functions.arrays))
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                value_offsets = T.sblock_alloc_buffer((tiling.num_offsets,), "int64")
                queries = T.meta_var(Queries(of_seq, token_begin, first_pos, sees_all))
                place = T.meta_var(place_of(tiling, context_lens, batch_start, vs, queries))
                valid_len: T.let = valid_tokens(spec, place, block_idx)
                tile = T.meta_var(tile_of(spec, tiling, place, block_idx, valid_len))
                values = T.meta_var(Cache(value_cache, v_block, v_row, v_head, value_offsets))
                head_offset: T.let = T.Cast("int64", kv_head) * v_head
                look_up_stage(block_table, values, tile, place.seq)
                num_full: T.let = tile.num_full
                rows = T.meta_var(place.rows(head_start, num_rows))
                tree = T.meta_var(
                    Tree(tree_mask, tree_start, tree_size, context_lens[of_seq] - tree_size) if tiling.attends else None
                )
                computed = T.meta_var(compute(of_mask, place, rows, tile, tile.num_groups, tree))
                with T.sblock("pv_matmul"):
                    T.reads()
                    T.writes()
                    pv_stage(probs, values, head_offset, tile, num_full, tile_acc, vs, computed)

    unused = () if functions.by_row else ("head_start", "num_rows")
    return without(pv_matmul, *unused, *not_taken(tiling))


def online_update(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """Fold tile_max, tile_sum, tile_acc of block block_idx, of num_steps blocks, into row_max, row_sum, acc."""
    arrays, merge_stage = Arrays(spec, tiling), state.merge(tiling.row_tile, spec.result_dim)

    @script.prim_func(s_tir=True)
    def online_update(
        tile_max_handle: T.handle,
        tile_sum_handle: T.handle,
        tile_acc_handle: T.handle,
        row_max_handle: T.handle,
        row_sum_handle: T.handle,
        acc_handle: T.handle,
        num_seqs: T.int32,
        block_idx: T.int32,
        num_steps: T.int32,
    ):
        tile_max = arrays.rows(tile_max_handle)
        tile_sum = arrays.rows(tile_sum_handle)
        tile_acc = arrays.acc(tile_acc_handle)
        row_max = arrays.rows(row_max_handle)
        row_sum = arrays.rows(row_sum_handle)
        acc = arrays.acc(acc_handle)
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                added = T.meta_var(State(tile_max, tile_sum, tile_acc, vs))
                merge_stage(added, State(row_max, row_sum, acc, vs), block_idx, num_steps)

    return online_update


def normalize(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """out and lse of every sequence of the chunk, for the heads [head_start, head_start + num_rows)."""
    arrays, normalize_stage = Arrays(spec, tiling), state.normalize(spec, tiling.row_tile)

    @script.prim_func(s_tir=True)
    def normalize(
        context_lens_handle: T.handle,
        row_max_handle: T.handle,
        row_sum_handle: T.handle,
        acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        sinks_handle: T.handle,
        batch_start: T.int32,
        of_seq: T.int32,
        token_begin: T.int32,
        first_pos: T.int32,
        sees_all: T.int32,
        num_seqs: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
    ):
        context_lens = arrays.context_lens(context_lens_handle)
        row_max = arrays.rows(row_max_handle)
        row_sum = arrays.rows(row_sum_handle)
        acc = arrays.acc(acc_handle)
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        if spec.sinks:
            sinks = arrays.sinks(sinks_handle)
        for s in range(num_seqs):
            with T.sblock("sequence"):
                vs = T.axis.spatial(num_seqs, s)
                T.reads()
                T.writes()
                queries = T.meta_var(Queries(of_seq, token_begin, first_pos, sees_all))
                place = T.meta_var(place_of(tiling, context_lens, batch_start, vs, queries))
                places: T.let = headroom(spec, place.length)
                result = T.meta_var(State(row_max, row_sum, acc, vs))
                rows = T.meta_var(place.rows(head_start, num_rows))
                normalize_stage(result, out, lse, rows, places, sinks if spec.sinks else None)

    return without(normalize, *not_taken(tiling))
