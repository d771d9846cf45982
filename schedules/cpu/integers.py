"""Numbers that become integers of 16 bits, side by side in lanes or with rows in lanes (kernels/integers.py)."""

from tvm.s_tir import Schedule

from pa_compiler.schedules.cpu.by_lanes import by_lanes
from pa_compiler.schedules.cpu.vertical import four_maxima, rows_last
from pa_compiler.schedules.intrinsics.pair_lanes import join_lanes
from pa_compiler.tiles import VectorTiling


def load_query(sch: Schedule, tiling: VectorTiling) -> None:
    """Elements of a query in lanes."""
    sch.vectorize(sch.split(sch.get_loops("query_number")[-1], [None, tiling.qk_lanes])[1])
    _in_lanes(sch, "query", "q_tile")


def integer_weights(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes."""
    _in_lanes(sch, "weight", "pairs")


def _in_lanes(sch: Schedule, of: str, words: str) -> None:
    by_lanes(sch, f"{of}_largest", 1)
    sch.vectorize(sch.get_loops(f"{of}_integers")[-1])
    word = sch.get_loops(words)[-1]
    sch.tensorize(word, join_lanes(int(sch.get(word).extent)))


def integer_weights_vertically(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes, and last in what is written."""
    rows_last(sch, "weight_integers", "pairs")
    four_maxima(sch, "weight_largest")
    sch.vectorize(sch.get_loops("weight_unit")[-1])
    for name in ("weight_integers", "pairs"):
        row, group, token = sch.get_loops(name)[-3:]
        sch.reorder(group, token, row)
        sch.vectorize(row)
