"""CPU strategy of the packed layout: tokens lie side by side in the lanes of a vector register, for any group.

    qk_matmul    qk_rows x qk_tokens scores in registers, one step for an element of head_dim (bfloat16: a pair of
                 them, that one vector of the cache holds): no sum across lanes, whatever the group
    the rest     as where head_dim lies in the lanes: a row of packed values is a token's

The fetches of the next tile are spread over the steps of the matmul; a sweep has none.
"""

import math
from collections.abc import Callable

from tvm.s_tir import Schedule

from pa_compiler.kernels.ahead import KEYS
from pa_compiler.schedules.cpu import attend, head_dim_in_lanes
from pa_compiler.schedules.cpu.by_element import WORDS, read_words
from pa_compiler.schedules.cpu.head_dim_in_lanes import unroll_tile
from pa_compiler.schedules.fetch import fetch
from pa_compiler.spec import PACKED_TOKENS
from pa_compiler.tiles import VectorTiling, largest_divisor

_FETCH_STEPS = 16
_PAIR = 2


def qk_matmul(sch: Schedule, tiling: VectorTiling) -> None:
    """Scores of a token group in registers."""
    scores = sch.get_sblock("scores")
    sums = sch.cache_write(scores, 0, "global")
    group, token, row, dim = sch.get_loops(scores)[-4:]
    row_outer, row = sch.split(row, [None, tiling.qk_rows])
    head_dim = int(sch.get(dim).extent)
    by_element = tiling.by_element and tiling.qk_rows > 1
    pair = largest_divisor(head_dim, WORDS if by_element else _PAIR)
    steps = largest_divisor(head_dim // pair, _FETCH_STEPS)
    if tiling.prefetches:  # as many fetches in each step of a register tile, so that none is in question at run time
        rows_of_keys = head_dim * tiling.keys.terms // tiling.keys.word
        fetches = tiling.token_group * -(-rows_of_keys // (PACKED_TOKENS * tiling.keys.rows_of_line))
        steps = largest_divisor(math.gcd(head_dim // pair, fetches), _FETCH_STEPS)
    dim_outer, dim, half = sch.split(dim, [steps, None, pair])
    # a vector must not reach past the tokens whose address is looked up once: it would be gathered one by one
    lanes = min(tiling.qk_tokens, PACKED_TOKENS)
    token_pass, token_outer, token = sch.split(token, [None, tiling.qk_tokens // lanes, lanes])
    # with several rows a key's element stays in its register for all of them; with one, both elements of a word do
    inner = (half, row, token_outer) if tiling.qk_rows > 1 else (row, token_outer, half)
    sch.reorder(group, row_outer, token_pass, dim_outer, dim, *inner, token)
    row_outer = sch.fuse(row_outer, token_pass)
    sch.reverse_compute_at(sums, row_outer, preserve_unit_loops=True)
    sch.split(sch.get_loops(sums)[-1], [None, lanes])
    unroll_tile(sch, sums, row, token_outer, token)
    sch.unroll(half)
    if by_element:
        read_words(sch, scores, dim)
    sch.decompose_reduction(scores, dim_outer)
    if tiling.prefetches:
        fetch(sch, KEYS, group, shares=[row_outer, dim_outer])


STAGES: dict[str, Callable[[Schedule, VectorTiling], None]] = (
    head_dim_in_lanes.IN_PLACE | attend.STAGES | {"qk_matmul": qk_matmul}
)
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = head_dim_in_lanes.SCALAR | attend.SCALAR
"""The sblocks that run as they are written, and why."""
