"""The policy: the strategy, and the register and cache tiles, of a spec on a target. Schedules are the mechanism."""

from __future__ import annotations

import math

from pa_compiler.cpu.target import CpuTarget
from pa_compiler.interface import split_blocks
from pa_compiler.spec import ITEMSIZES, PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import Tiling, divisors, equal_tile, largest_divisor

KV_TILE = 128
"""Tokens whose scores are held at once in the fused kernel, at most: long enough to amortise the rescale of acc, short
enough that scores and probs of 16 rows (8 KB each) stay in the first-level cache."""

KV_TILE_BYTES = 1 << 17
"""Keys and values of one head and such a tile, at most: with the tile that is fetched meanwhile, half of a second-level
cache of 512 KB. Half as many where there are several kv heads: a head's tokens then lie some KB apart, and lines share
the few places that the cache has for them."""

HEADS_IN_LANES = 16
"""Rows from which on heads lie in the lanes: with 8 of them, AVX2 has measured slower than head_dim in the lanes."""

DOT_DIMS = 8
"""What head_dim is a multiple of where pairs of bfloat16 are multiplied: the words of it then fill vectors of 4."""

SWEEP_INTENSITY = 2
"""FLOPs a byte of the caches up to which the memory is the limit: what a core computes while it reads a byte."""

SWEEP_BYTES = 1 << 18
"""Scores and probabilities of all heads and a tile of tokens, at most."""

LINE_BYTES = 64
"""A line of the memory system."""


STAGED_ELEMENTS = 1 << 26
"""float32 numbers of an intermediate of the staged pipeline, at most: 256 MB, of which there are four."""


def check(spec: PagedAttentionSpec, pipeline: str) -> None:
    """Refuse a spec that a pipeline does not cover.

    Raises:
        ValueError: names the field, what the pipeline takes and what it got.
    """
    if spec.shared_kv or spec.result_dim != spec.head_dim:
        raise NotImplementedError(f"value_dim: expected head_dim = {spec.head_dim} on CPUs, got {spec.result_dim}")
    of_sequence = _rows(spec) * max(spec.block_size, spec.head_dim)
    if pipeline == "staged" and spec.batch_chunk * of_sequence > STAGED_ELEMENTS:
        sizes = f"{_rows(spec)} heads, block_size = {spec.block_size} and head_dim = {spec.head_dim}"
        raise ValueError(
            f"batch_chunk: expected 1 to {STAGED_ELEMENTS // of_sequence} for pipeline staged with tiles of {sizes}, "
            f"got {spec.batch_chunk}"
        )


def choose(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str) -> Tiling:
    """Choose the tiles from the spec and the target's features alone."""
    rows = _rows(spec)
    in_pairs = spec.dtype == "bfloat16" and spec.head_dim % 2 == 0
    word_elements = 2 if in_pairs and (pipeline == "fused" or spec.kv_layout == "packed") else 1
    dim_pair = 1 if spec.kv_layout == "packed" else word_elements
    lanes = math.gcd(spec.head_dim // dim_pair, target.vector_lanes)
    dot_pairs = in_pairs and pipeline == "fused" and target.dot_pairs and spec.head_dim % DOT_DIMS == 0
    # of a vector of the cache, in loads from the first-level cache
    load_cost = 2 if spec.dtype == "float32" or dot_pairs else 3
    vectors = [dim_pair * count for count in divisors(spec.head_dim // (dim_pair * lanes))]
    pv_rows, pv_vectors = register_tile(rows, vectors, target, load_cost, 1)
    pv_dims = pv_vectors * lanes
    strategy, _ = choose_strategy(spec, target, pipeline)
    if strategy == "tokens_in_lanes":
        whole_groups = [groups * PACKED_TOKENS // target.vector_lanes for groups in (1, 2, 4)]
        qk_rows, qk_vectors = register_tile(rows, [1, *whole_groups], target, load_cost, 2, broadcasts=True)
        qk_tokens = qk_vectors * target.vector_lanes
        token_group = max(qk_tokens, PACKED_TOKENS)
    elif strategy == "heads_in_lanes":
        qk_rows = pv_rows = rows
        tokens = target.vector_sums // (rows // target.vector_lanes)
        token_group = qk_tokens = 1 << (tokens.bit_length() - 1)  # more, up to tokens, has measured slower
        pv_dims = largest_divisor(spec.head_dim, qk_tokens)
    else:
        token_group = lanes
        qk_rows, qk_tokens = register_tile(rows, divisors(lanes), target, load_cost, 2)
    tile_bytes = KV_TILE_BYTES if spec.num_kv_heads == 1 else KV_TILE_BYTES // 2
    kv_tile = min(KV_TILE, tile_bytes // (2 * spec.head_dim * ITEMSIZES[spec.dtype]))
    return Tiling(
        strategy=strategy,
        row_tile=rows,
        kv_tile=spec.block_size if pipeline == "staged" else max(1, kv_tile // token_group) * token_group,
        token_group=token_group,
        lanes=lanes,
        qk_rows=qk_rows,
        qk_tokens=qk_tokens,
        pv_rows=pv_rows,
        pv_dims=pv_dims,
        copy_keys=strategy == "heads_in_lanes" and spec.dtype != "float32" and not dot_pairs,
        copy_values=strategy == "heads_in_lanes" and spec.dtype != "float32",
        dot_pairs=dot_pairs,
        sweep=_sweep(spec, strategy, pipeline),
        word_elements=word_elements,
        line_elements=LINE_BYTES // ITEMSIZES[spec.dtype],
        split_blocks=split_blocks(spec),
    )


def choose_strategy(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str) -> tuple[str, str]:
    """Tiling.strategy, and the reason in one sentence."""
    rows, lanes = _rows(spec), target.vector_lanes
    if spec.kv_layout == "packed":
        return "tokens_in_lanes", "kv_layout packed has the tokens of a block side by side."
    if pipeline != "fused":
        return "head_dim_in_lanes", f"It is the one strategy of pipeline {pipeline} for kv_layout {spec.kv_layout}."
    tile = f"{rows} query head{'' if rows == 1 else 's'} in a tile"
    if rows < HEADS_IN_LANES:
        return "head_dim_in_lanes", f"{tile}: heads lie in lanes from {HEADS_IN_LANES} on."
    if rows % lanes:
        return "head_dim_in_lanes", f"{tile}: not whole vectors of {lanes}."
    if rows > target.vector_sums * lanes:
        return (
            "head_dim_in_lanes",
            f"{tile}: more than {target.vector_sums} vectors of {lanes}, whose sums fit in registers.",
        )
    return "heads_in_lanes", f"{tile}: whole vectors of {lanes}, and {HEADS_IN_LANES} or more."


def _sweep(spec: PagedAttentionSpec, strategy: str, pipeline: str) -> str | None:
    """Tiling.sweep: for work that the memory limits, in the order in which a block lies there."""
    intensity = 2 * _rows(spec) / ITEMSIZES[spec.dtype]
    scratch = 2 * KV_TILE * spec.num_heads * ITEMSIZES["float32"]
    if pipeline != "fused" or strategy == "heads_in_lanes" or intensity > SWEEP_INTENSITY or scratch > SWEEP_BYTES:
        return None
    if strategy == "tokens_in_lanes" and _rows(spec) > 1:
        return None  # with 4 rows of float32 it has measured two thirds of the speed
    return "tokens" if spec.kv_layout == "NHD" else "heads"


def _rows(spec: PagedAttentionSpec) -> int:
    """row_tile of a spec."""
    return equal_tile(spec.group, spec.head_tile)


def register_tile(
    rows: int, columns: list[int], target: CpuTarget, load_cost: float, held: int, broadcasts: bool = False
) -> tuple[int, int]:
    """How many rows and columns of vectors of an outer product have their sums in registers at once.

    A divisor of rows and one of the given numbers of columns, with the fewest loads for an FMA: a row costs one, a
    column load_cost. A column is loaded once for all rows, and takes `held` registers meanwhile. With broadcasts an
    element of a row takes one too, and so does the mask of a pair, where instructions do not broadcast themselves.
    """
    of_row = 2 if broadcasts and not target.embeds_broadcasts else 0

    def fits(r: int, c: int) -> bool:
        operands = held * c + of_row if r > 1 else 0
        return r * c <= target.vector_sums and r * c + operands <= target.vector_registers

    tiles = [
        ((r + load_cost * c) / (r * c), -r, (r, c))
        for r in divisors(rows)
        for c in columns
        if fits(r, c) or (r == 1 and c == min(columns))
    ]
    return min(tiles)[2]
