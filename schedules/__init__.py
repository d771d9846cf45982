"""Schedules: how the kernels run on a target. One file per strategy; a schedule changes loops, never the maths."""

from tvm import IRModule

from pa_compiler.schedules import append_kv, heads_in_lanes
from pa_compiler.tiling import Tiling


def schedule(mod: IRModule, tiling: Tiling) -> IRModule:
    """The module with every PrimFunc scheduled. The one given may be changed: use it no more."""
    return append_kv.schedule(heads_in_lanes.schedule(mod, tiling))
