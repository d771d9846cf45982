"""CPU strategy: the rows of a head tile lie side by side in the lanes of a vector register.

Scores are [token, row], so the whole softmax is vertical: no reduction across lanes anywhere. A row of the caches is
broadcast element by element against a register of rows:

    qk_matmul    token_group x row_tile sums in registers, one step per element of head_dim
    pv_matmul    dim_group x row_tile sums in registers, one step per token

The kernels keep rows as the last axis of every intermediate. Register tiles come from cache_write: LLVM keeps a sum in
a register only where it lives in a small buffer of its own.
"""

from collections.abc import Callable

from tvm import IRModule
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from pa_compiler.tiling import Tiling


def schedule(mod: IRModule, tiling: Tiling) -> IRModule:
    """Schedule every stage of every PrimFunc of either pipeline."""
    sch = Schedule(mod)
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        present = _sblock_names(sch)
        for stage, apply in _STAGES.items():
            if stage in present:
                apply(sch, tiling)
    return sch.mod


def _qk_matmul(sch: Schedule, tiling: Tiling) -> None:
    scores = sch.get_sblock("scores")
    sums = sch.cache_write(scores, 0, "global")
    token_outer, token, row, dim = sch.get_loops(scores)[-4:]
    sch.reorder(token_outer, dim, token, row)
    _write_back(sch, sums, token_outer)
    k_tile = sch.get_sblock("k_tile")
    if tiling.copy_tiles:
        sch.compute_at(k_tile, token_outer, preserve_unit_loops=True)
        _vectorize_copy(sch, k_tile, tiling)
    else:
        sch.compute_inline(k_tile)
    sch.unroll(token)
    sch.vectorize(row)
    sch.decompose_reduction(scores, dim)


def _softmax_prepare(sch: Schedule, tiling: Tiling) -> None:
    for name in ("scaled", "tile_max", "probs", "tile_sum"):
        block = sch.get_sblock(name)
        token_outer, _, row = sch.get_loops(block)[-3:]
        sch.vectorize(row)
        if name in ("tile_max", "tile_sum"):
            sch.decompose_reduction(block, token_outer)


def _pv_matmul(sch: Schedule, tiling: Tiling) -> None:
    tile_acc = sch.get_sblock("tile_acc")
    sums = sch.cache_write(tile_acc, 0, "global")
    token, row, dim = sch.get_loops(tile_acc)[-3:]
    dim_outer, dim = sch.split(dim, [None, tiling.dim_group])
    sch.reorder(dim_outer, token, dim, row)
    _write_back(sch, sums, dim_outer)
    v_tile = sch.get_sblock("v_tile")
    if tiling.copy_tiles:
        _vectorize_copy(sch, v_tile, tiling)
    else:
        sch.compute_inline(v_tile)
    sch.unroll(dim)
    sch.vectorize(row)
    sch.decompose_reduction(tile_acc, token)


def _online_update(sch: Schedule, tiling: Tiling) -> None:
    _vectorize_rows(sch, "rescale", "new_sum", "row", "acc")


def _store_partial(sch: Schedule, tiling: Tiling) -> None:
    _vectorize_rows(sch, "store_row", "store_acc")


def _normalize(sch: Schedule, tiling: Tiling) -> None:
    _vectorize_rows(sch, "normalize")


_STAGES: dict[str, Callable[[Schedule, Tiling], None]] = {
    "qk_matmul": _qk_matmul,
    "softmax_prepare": _softmax_prepare,
    "pv_matmul": _pv_matmul,
    "online_update": _online_update,
    "store_partial": _store_partial,
    "normalize": _normalize,
}


def _vectorize_rows(sch: Schedule, *sblocks: str) -> None:
    for name in sblocks:
        sch.vectorize(sch.get_loops(sch.get_sblock(name))[-1])


def _write_back(sch: Schedule, sums: SBlockRV, loop: LoopRV) -> None:
    """Copy the register sums of one pass of the loop to where they belong, in vectors of rows."""
    sch.reverse_compute_at(sums, loop, preserve_unit_loops=True)
    *_, sum_loop, row = sch.get_loops(sums)
    sch.unroll(sum_loop)
    sch.vectorize(row)


def _vectorize_copy(sch: Schedule, copy: SBlockRV, tiling: Tiling) -> None:
    """Read a cache row in vectors, unrolled so that its address is computed once for many."""
    dim = sch.get_loops(copy)[-1]
    _, vector, lane = sch.split(dim, [None, tiling.load_unroll, tiling.load_lanes])
    sch.unroll(vector)
    sch.vectorize(lane)


def _sblock_names(sch: Schedule) -> set[str]:
    names = set()
    root = sch.get_sblock("root")
    pending = [root]
    while pending:
        for child in sch.get_child_blocks(pending.pop()):
            names.add(sch.get(child).name_hint)
            pending.append(child)
    return names
