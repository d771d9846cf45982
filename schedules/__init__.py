"""Schedules: how the kernels run on a target. One file per strategy; a schedule changes loops, never the maths.

Each file has STAGES, which says for the name of an sblock what to do with it.
"""

import dataclasses

from tvm import IRModule
from tvm.s_tir import Schedule

from pa_compiler.schedules import append_kv, cuda_threads, head_dim_in_lanes, heads_in_lanes, tokens_in_lanes
from pa_compiler.tiling import Tiling

_STRATEGIES = {
    "heads_in_lanes": heads_in_lanes,
    "head_dim_in_lanes": head_dim_in_lanes,
    "tokens_in_lanes": tokens_in_lanes,
    "cuda_threads": cuda_threads,
}


def schedule(mod: IRModule, tiling: Tiling) -> IRModule:
    """The module with every PrimFunc scheduled. The one given may be changed: use it no more.

    Merging partial results is the same for every strategy: head_dim lies in order in them, and is gone through once.
    """
    sch = Schedule(mod)
    in_order = dataclasses.replace(
        tiling, strategy="head_dim_in_lanes", word_elements=1, pv_rows=1, pv_dims=tiling.lanes
    )
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        tiles = in_order if variable.name_hint == "merge_partials" else tiling
        stages = _STRATEGIES[tiles.strategy].STAGES | append_kv.STAGES
        present = _sblock_names(sch)
        for stage, apply in stages.items():
            if stage in present:
                apply(sch, tiles)
    return sch.mod


def _sblock_names(sch: Schedule) -> set[str]:
    names = set()
    pending = [sch.get_sblock("root")]
    while pending:
        for child in sch.get_child_blocks(pending.pop()):
            names.add(sch.get(child).name_hint)
            pending.append(child)
    return names
