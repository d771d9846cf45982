"""Numbers that become integers, side by side in lanes or with rows in lanes (kernels/integers.py)."""

import functools
from typing import Any

from tvm.s_tir import Schedule

from pa_compiler.kernels.caches import elements_of_operand
from pa_compiler.schedules.cpu.by_lanes import by_lanes
from pa_compiler.schedules.cpu.vertical import four_maxima, rows_last
from pa_compiler.schedules.intrinsics.pair_lanes import join_fours, join_lanes
from pa_compiler.tiles import VectorTiling


def load_query(sch: Schedule, tiling: VectorTiling) -> None:
    """Elements of a query in lanes."""
    sch.vectorize(sch.split(sch.get_loops("query_number")[-1], [None, tiling.qk_lanes])[1])
    _in_lanes(sch, "query")
    word = sch.get_loops("q_tile")[-1]
    words = int(sch.get(word).extent)
    of_eights = functools.partial(elements_of_operand, tiling.keys, 0)
    sch.tensorize(word, join_fours(words, of_eights, "eights") if tiling.keys.terms == 4 else join_lanes(words))


def integer_weights(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes."""
    _in_lanes(sch, "weight")
    word = sch.get_loops("pairs")[-1]
    words, in_fours = int(sch.get(word).extent), tiling.values.terms == 4
    if words > 1:
        sch.tensorize(word, join_fours(words, side_by_side, "neighbours") if in_fours else join_lanes(words))
    if in_fours:
        group, token = sch.get_loops("weight_lost_parts")[-2:]
        sch.vectorize(token)
        sch.vectorize(sch.get_loops(sch.decompose_reduction("weight_lost_parts", group))[-1])


def side_by_side(word: Any) -> tuple[Any, ...]:
    """The four tokens of a word."""
    return tuple(4 * word + i for i in range(4))


def _in_lanes(sch: Schedule, of: str) -> None:
    by_lanes(sch, f"{of}_largest", 1)
    sch.vectorize(sch.get_loops(f"{of}_integers")[-1])


def integer_weights_vertically(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes, and last in what is written."""
    rows_last(sch, "weight_integers", "pairs")
    four_maxima(sch, "weight_largest")
    sch.vectorize(sch.get_loops("weight_unit")[-1])
    for name in ("weight_integers", "pairs"):
        row, group, token = sch.get_loops(name)[-3:]
        sch.reorder(group, token, row)
        sch.vectorize(row)
