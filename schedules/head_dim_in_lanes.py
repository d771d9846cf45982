"""CPU strategy: the elements of head_dim lie side by side in the lanes of a vector register."""

from collections.abc import Callable

from tvm import IRModule
from tvm.s_tir import Schedule

from pa_compiler.schedules.sum_lanes import sum_lanes
from pa_compiler.tiling import Tiling


def schedule(mod: IRModule, tiling: Tiling) -> IRModule:
    sch = Schedule(mod)
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        present = _sblock_names(sch)
        for stage, apply in _STAGES.items():
            if stage in present:
                apply(sch, tiling)
    return sch.mod


def _load_query(sch, tiling):
    d = sch.get_loops(sch.get_sblock("q_tile"))[-1]
    sch.vectorize(sch.split(d, [None, tiling.lanes])[-1])


def _qk_matmul(sch, tiling):
    scores = sch.get_sblock("scores")
    sch.compute_inline(sch.get_sblock("k_tile"))
    *_, dim = sch.get_loops(scores)
    _, lane = sch.split(dim, [None, tiling.lanes])
    parts = sch.rfactor(lane, factor_axis=3)
    group, token, row, lane = sch.get_loops(scores)[-4:]
    sch.reorder(row, token, lane)
    sch.compute_at(parts, group, preserve_unit_loops=True)
    sums = sch.cache_write(parts, 0, "global")
    lane, token, row, dim = sch.get_loops(parts)[-4:]
    token_outer, token = sch.split(token, [None, tiling.qk_tokens])
    row_outer, row = sch.split(row, [None, tiling.qk_rows])
    sch.reorder(token_outer, row_outer, dim, token, row, lane)
    sch.reverse_compute_at(sums, row_outer, preserve_unit_loops=True)
    for loop in sch.get_loops(sums)[-3:-1]:
        sch.unroll(loop)
    sch.vectorize(sch.get_loops(sums)[-1])
    sch.unroll(token)
    sch.unroll(row)
    sch.vectorize(lane)
    sch.decompose_reduction(parts, dim)
    row, token, lane = sch.get_loops(scores)[-3:]
    init = sch.decompose_reduction(scores, token)
    sch.vectorize(sch.get_loops(init)[-1])
    sch.tensorize(token, sum_lanes(tiling.lanes))
    fetch = sch.get_sblock("prefetch_keys")
    fetch_group, fetch_token, _ = sch.get_loops(fetch)[-3:]
    fetch_outer, fetch_token = sch.split(fetch_token, [None, tiling.qk_tokens])
    group = sch.merge(fetch_group, group)
    fetch_outer = sch.get_loops(fetch)[-3]
    sch.merge(fetch_outer, sch.get_loops(sch.get_sblock("scores_rf_update"))[-6])


def _softmax_prepare(sch, tiling):
    for name in ("scaled", "probs"):
        sch.vectorize(sch.get_loops(sch.get_sblock(name))[-1])
    for name, axis in (("peak", 1), ("tile_sum", 2)):
        block = sch.get_sblock(name)
        *_, lane = sch.get_loops(block)
        parts = sch.rfactor(lane, factor_axis=axis)
        row, lane = sch.get_loops(block)[-2:]
        sch.compute_at(parts, row)
        sums = sch.cache_write(parts, 0, "global")
        lane, group = sch.get_loops(parts)[-2:]
        sch.reorder(group, lane)
        sch.vectorize(lane)
        sch.vectorize(sch.get_loops(sums)[-1])
        sch.decompose_reduction(parts, group)
        row, lane = sch.get_loops(block)[-2:]
        sch.unroll(lane)
        sch.decompose_reduction(block, lane)


def _pv_matmul(sch, tiling):
    full = sch.get_sblock("full_groups")
    sums = sch.cache_write(full, 0, "global")
    group, token, row, dim = sch.get_loops(full)[-4:]
    row_outer, row = sch.split(row, [None, tiling.pv_rows])
    dim_outer, vector, lane = sch.split(dim, [None, tiling.pv_vectors, tiling.lanes])
    sch.reorder(row_outer, dim_outer, group, token, row, vector, lane)
    sch.reverse_compute_at(sums, dim_outer, preserve_unit_loops=True)
    fetch = sch.get_sblock("prefetch_values")
    sch.compute_at(fetch, group, preserve_unit_loops=True)
    sum_row, sum_dim = sch.get_loops(sums)[-2:]
    _, sum_vector, sum_lane = sch.split(sum_dim, [None, tiling.pv_vectors, tiling.lanes])
    sch.unroll(sum_row)
    sch.unroll(sum_vector)
    sch.vectorize(sum_lane)
    sch.unroll(token)
    sch.unroll(row)
    sch.unroll(vector)
    sch.vectorize(lane)
    sch.decompose_reduction(full, group)
    _vectorize_dims(sch, tiling, "tile_acc")
    rest = sch.get_sblock("tile_acc")
    sch.decompose_reduction(rest, sch.get_loops(rest)[-4])


def _online_update(sch, tiling):
    for name in ("rescale", "new_sum", "row"):
        sch.vectorize(sch.get_loops(sch.get_sblock(name))[-1])
    _vectorize_dims(sch, tiling, "acc")


def _store_partial(sch, tiling):
    _vectorize_dims(sch, tiling, "store_acc")


def _vectorize_dims(sch, tiling, *names):
    for name in names:
        dim = sch.get_loops(sch.get_sblock(name))[-1]
        sch.vectorize(sch.split(dim, [None, tiling.lanes])[-1])


_STAGES = {"load_query": _load_query, "qk_matmul": _qk_matmul, "softmax_prepare": _softmax_prepare,
    "pv_matmul": _pv_matmul, "online_update": _online_update, "store_partial": _store_partial,
}


def _sblock_names(sch: Schedule) -> set[str]:
    names = set()
    root = sch.get_sblock("root")
    pending = [root]
    while pending:
        for child in sch.get_child_blocks(pending.pop()):
            names.add(sch.get(child).name_hint)
            pending.append(child)
    return names
