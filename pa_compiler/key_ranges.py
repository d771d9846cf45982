"""Where a library for a CPU cuts the keys of a sequence, into ranges and steps: the bits of a result depend on it."""

from __future__ import annotations

import math

from pa_compiler.spec import PagedAttentionSpec

SPLIT_TOKENS = 2048
"""Tokens of one kv head after which a sequence is split into block ranges; with more kv heads ranges are shorter. A
constant, so that a sequence is cut at the same places in every batch and at every thread count."""

MIN_SPLIT_TOKENS = 256
"""Below this a range would not be worth the merge of its result."""


def split_blocks(spec: PagedAttentionSpec) -> int:
    """Blocks of one range of a long sequence in the fused pipeline, the same for every CPU."""
    if decodes_in_step(spec):
        return attend_range_blocks(spec)
    return -(-_split_tokens(spec) // spec.block_size)


def _split_tokens(spec: PagedAttentionSpec) -> int:
    return max(MIN_SPLIT_TOKENS, SPLIT_TOKENS // spec.num_kv_heads)


ATTEND_ITEM_ROWS = 512
"""Rows, pairs of a query token and a query head, of a work item of attend; more only where one query token has more."""

ATTEND_KV_TILE = 128
"""Tokens of one step of attend's online softmax: a divisor of this."""

ATTEND_STEP_BYTES = 1 << 19
"""Keys and values of a step of a work item of attend, in all of its kv heads, at most, where a token's heads lie side
by side: the next step's are fetched in that order, and both have to be in a second-level cache of 1 MB."""

ATTEND_RANGE_TOKENS = 4096
"""Tokens of a range of keys in attend, about: whole blocks, and whole steps."""


def attend_tiles(spec: PagedAttentionSpec, row_tile: int) -> int:
    """Tiles of row_tile rows that a work item of attend has at most."""
    return max(ATTEND_ITEM_ROWS // row_tile, -(-spec.group // row_tile))


def attend_heads(spec: PagedAttentionSpec) -> int:
    """kv heads that a work item of attend has at most."""
    elements = spec.head_dim if spec.shared_kv else spec.head_dim + spec.result_dim
    most = ATTEND_STEP_BYTES // (ATTEND_KV_TILE * spec.cache_bytes(elements))
    return spec.num_kv_heads if spec.kv_layout != "NHD" else min(max(most, 1), spec.num_kv_heads)


def attend_range_blocks(spec: PagedAttentionSpec) -> int:
    """Blocks of one range of keys in attend: ranges are cut at multiples of it from the first block on.

    Where decode has the same ranges they are as short as it needs them, to divide a sequence among threads.
    """
    unit = math.lcm(spec.block_size, ATTEND_KV_TILE)
    units = -(-ATTEND_RANGE_TOKENS // unit)
    if spec.invariant or decodes_in_step(spec):
        units = max((_split_tokens(spec) if decodes_in_step(spec) else SPLIT_TOKENS) // unit, 1)
    return units * unit // spec.block_size


def decodes_in_step(spec: PagedAttentionSpec) -> bool:
    """Whether the fused decode can take a sequence in the steps of attend: both give a query token the same bits then.

    It does where the spec is invariant, and otherwise where cpu.tiles.choose finds no sweep. Of packed keys both add up
    products one after the other. What functions compute is contracted differently, and one row of float32 is swept on
    every CPU, unless the spec is invariant.
    """
    is_free = spec.group > 1 or spec.dtype != "float32"
    return spec.kv_layout == "packed" and not spec.functions and (spec.invariant or is_free)


def decodes_by_attend(spec: PagedAttentionSpec, pipeline: str) -> bool:
    """Whether a CPU takes single query tokens as attend takes several, in decode too: so all of them get the same bits.

    Where they do not get them in decode itself. Staged, decode and attend have the same stages and steps anyway.
    """
    return spec.invariant and pipeline == "fused" and not decodes_in_step(spec)
