"""What scales of codes multiply, with tokens in lanes; and their gathering, token by token."""

import math

from tvm.s_tir import Schedule

from pa_compiler.kernels.scales import OFFSETS
from pa_compiler.schedules.cpu import integers
from pa_compiler.spec import PACKED_TOKENS
from pa_compiler.tiles import VectorTiling


def head_scales(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes: one load where their scales lie side by side."""
    inside = {sch.get(each).name_hint for each in sch.get_child_blocks(sch.get_sblock("head_scales"))}
    for name in ("key_scale", "value_scale", "key_zero", "value_zero"):
        if name not in inside:
            continue
        lane = sch.split(sch.get_loops(name)[-1], [None, math.gcd(tiling.token_group, PACKED_TOKENS)])[1]
        sch.vectorize(lane)


def weigh_values(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens in lanes."""
    sch.vectorize(sch.get_loops("weighted")[-1])


def weigh_values_vertically(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes, and last in what is written."""
    sch.transform_layout("weighted", ("write", 0), lambda slot, row, token: (slot, token, row))
    row, group, token = sch.get_loops("weighted")[-3:]
    sch.reorder(group, token, row)
    sch.vectorize(row)


def sum_zeros(sch: Schedule, tiling: VectorTiling) -> None:
    """Tokens of a group in lanes, which are added up at last."""
    group, token = sch.get_loops("zero_parts")[-2:]
    sch.vectorize(token)
    sch.vectorize(sch.get_loops(sch.decompose_reduction("zero_parts", group))[-1])


def sum_zeros_vertically(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes, and last in what is written."""
    sch.transform_layout("zero_parts", ("write", 0), lambda row, token: (token, row))
    row, group, token = sch.get_loops("zero_parts")[-3:]
    sch.reorder(group, token, row)
    sch.vectorize(row)
    sch.decompose_reduction("zero_parts", group)
    row, token = sch.get_loops("zero_sum")[-2:]
    sch.reorder(token, row)
    sch.vectorize(row)
    sch.decompose_reduction("zero_sum", token)


def weigh_factors(sch: Schedule, tiling: VectorTiling) -> None:
    """Rows in lanes."""
    sch.vectorize(sch.get_loops("weighted_factor")[-1])


SCALAR = dict.fromkeys(OFFSETS, "a look-up of block_table for each token, once for all heads") | {
    "query_sums": "a sum of each row of queries, once for all keys",
}
"""The sblocks that run as they are written, and why."""

STAGES = {
    "head_scales": head_scales,
    "weigh_values": weigh_values,
    "weigh_factors": weigh_factors,
    "sum_zeros": sum_zeros,
    "integer_weights": integers.integer_weights,
}
"""How each stage is scheduled, by the name of its sblock."""

VERTICAL = STAGES | {
    "weigh_values": weigh_values_vertically,
    "sum_zeros": sum_zeros_vertically,
    "integer_weights": integers.integer_weights_vertically,
}
"""The same where rows lie in lanes."""
