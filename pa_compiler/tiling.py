"""The policy: which register and cache tiles a spec gets on a target. The schedules are the mechanism."""

from __future__ import annotations

import dataclasses

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.target import CpuTarget

KV_TILE = 128
"""Tokens whose scores are held at once in the fused kernel: long enough to amortise the rescale of acc, short enough
that scores and probs of 16 rows (8 KB each) stay in the first-level cache."""

SPLIT_TOKENS = 2048
"""Tokens after which a sequence is split into block ranges. A constant, so that a sequence is cut at the same places in
every batch and at every thread count."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes that kernels and schedules agree on.

    Attributes:
        row_tile: Rows (query heads of one kv head) of a tile, padded to a power of two; the vector lanes.
        kv_tile: Tokens of one step of the online softmax. In the staged pipeline: block_size.
        token_group: Tokens whose scores are summed in registers at once; a tile is padded to a multiple of it.
        dim_group: Elements of head_dim whose outputs are summed in registers at once; divides head_dim.
        load_lanes: Elements that one vector load of a cache row takes; divides head_dim.
        load_unroll: Vector loads in a row; load_lanes * load_unroll divides head_dim.
        copy_tiles: Whether keys and values are converted into scratch first; where not, the matmuls read the caches.
        split_blocks: Blocks of one range of a long sequence.
    """

    row_tile: int
    kv_tile: int
    token_group: int
    dim_group: int
    load_lanes: int
    load_unroll: int
    copy_tiles: bool
    split_blocks: int

    @property
    def padded_kv_tile(self) -> int:
        """kv_tile rounded up to whole token groups."""
        return -(-self.kv_tile // self.token_group) * self.token_group


def choose(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str) -> Tiling:
    """Choose the tiles from the spec and the target's features alone."""
    row_tile = min(spec.head_tile, 1 << (spec.group - 1).bit_length())
    vectors_per_row_tile = max(1, row_tile // target.vector_lanes)
    sums = max(1, target.accumulators // vectors_per_row_tile)
    load_lanes = _largest_divisor(spec.head_dim, target.vector_lanes)
    kv_tile = spec.block_size if pipeline == "staged" else KV_TILE
    return Tiling(
        row_tile=row_tile,
        kv_tile=kv_tile,
        token_group=min(sums, kv_tile),
        dim_group=_largest_divisor(spec.head_dim, sums),
        load_lanes=load_lanes,
        load_unroll=_largest_divisor(spec.head_dim // load_lanes, 32),
        copy_tiles=spec.dtype != "float32" or spec.block_size % kv_tile != 0,
        split_blocks=-(-SPLIT_TOKENS // spec.block_size),
    )


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
