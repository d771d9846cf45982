"""What attend has beside the stages of decode, where value_dim, or the tokens of a tile, lie in lanes."""

from collections.abc import Callable

from tvm.s_tir import Schedule

from pa_compiler.schedules.cpu.by_lanes import by_lanes
from pa_compiler.schedules.cpu.head_dim_in_lanes import vectorize_in_order, vectorize_rows
from pa_compiler.tiles import VectorTiling


def bounds(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes."""
    vectorize_rows(sch, "row_bounds")


def empty_state(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of acc as vectors."""
    vectorize_rows(sch, "empty_row")
    vectorize_in_order(sch, tiling, "empty_acc")


def full_scores(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes."""
    sch.vectorize(sch.get_loops("full_scaled")[-1])
    by_lanes(sch, "full_peak", 1)


def edges(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes."""
    sch.vectorize(sch.get_loops("edge")[-1])


def range_rescale(sch: Schedule, tiling: VectorTiling) -> None:
    """As rescale."""
    vectorize_rows(sch, "range_factors", "range_new_sum", "range_row")


def range_fold(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows of acc as vectors."""
    vectorize_in_order(sch, tiling, "range_acc")


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = {
    "bounds": bounds,
    "empty_state": empty_state,
    "edges": edges,
    "full_scores": full_scores,
    "range_rescale": range_rescale,
    "range_fold": range_fold,
}
"""How each stage is scheduled, by the name of its sblock."""

_AROUND = "loops around stages"
SCALAR = {
    "key_range": _AROUND,
    "row_tile": _AROUND,
    "seen_scores": "scheduled with softmax_prepare",
    "range_state": _AROUND,
    "runs": "two numbers for each interval of a mask and each query token, once for a work item",
    "span": "two numbers for each tile of rows, once for a work item",
}
"""The sblocks that run as they are written, and why."""
