"""CPU strategy of merge_parts, beside normalize: heads in lanes for lse and weights, value_dim in lanes for out."""

from collections.abc import Callable

from tvm.s_tir import Schedule

from pa_compiler.schedules.cpu.head_dim_in_lanes import vectorize_in_order, vectorize_rows
from pa_compiler.tiles import VectorTiling


def largest_lse(sch: Schedule, tiling: VectorTiling) -> None:
    """Heads in lanes."""
    vectorize_rows(sch, "largest_lse")


def weigh_part(sch: Schedule, tiling: VectorTiling) -> None:
    """Heads in lanes."""
    vectorize_rows(sch, "weight", "sum_of_weights")


def weighed_part(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of acc as vectors."""
    vectorize_in_order(sch, tiling, "weighed_part")


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    "largest_lse": largest_lse,
    "weigh_part": weigh_part,
    "weighed_part": weighed_part,
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = {"part": "loops around stages"}
"""The sblocks that run as they are written, and why."""
