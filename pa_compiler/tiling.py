"""The policy: which register and cache tiles a spec gets on a target. The schedules are the mechanism."""

from __future__ import annotations

import dataclasses
import math

from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.target import CpuTarget

KV_TILE = 128
LINE_BYTES = 64
SPLIT_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Tiling:
    strategy: str
    row_tile: int
    kv_tile: int
    token_group: int
    lanes: int
    qk_rows: int
    qk_tokens: int
    pv_rows: int
    pv_vectors: int
    line_elements: int
    split_blocks: int

    @property
    def padded_kv_tile(self) -> int:
        return -(-self.kv_tile // self.token_group) * self.token_group

    @property
    def num_offsets(self) -> int:
        return self.kv_tile + self.padded_kv_tile

    def row_tiles(self, spec) -> int:
        return -(-spec.group // self.row_tile)


def choose(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str) -> Tiling:
    tiles = -(-spec.group // spec.head_tile)
    rows = -(-spec.group // tiles)
    lanes = math.gcd(spec.head_dim, target.vector_lanes)
    kv_tile = spec.block_size if pipeline == "staged" else KV_TILE
    sums = target.accumulators
    qk_rows = _largest_divisor(rows, sums)
    pv_rows = qk_rows
    return Tiling(
        strategy="head_dim_in_lanes",
        row_tile=rows,
        kv_tile=kv_tile,
        token_group=lanes,
        lanes=lanes,
        qk_rows=qk_rows,
        qk_tokens=_largest_divisor(lanes, max(1, sums // qk_rows)),
        pv_rows=pv_rows,
        pv_vectors=_largest_divisor(spec.head_dim // lanes, max(1, sums // pv_rows)),
        line_elements=LINE_BYTES // ITEMSIZES[spec.dtype],
        split_blocks=max(1, 2048 // spec.num_kv_heads // spec.block_size),
    )


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
