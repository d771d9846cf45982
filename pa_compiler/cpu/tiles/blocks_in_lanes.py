"""Tiles where blocks of 2 rows x 2 tokens lie in the lanes of a vector: attend of bfloat16 on CPUs with bfmmla."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import Basis
from pa_compiler.cpu.tiles.heads_in_lanes import HeadsInLanes


@dataclasses.dataclass(frozen=True)
class BlocksInLanes(HeadsInLanes):
    """Tiles of schedules/cpu/blocks_in_lanes.py: those of HeadsInLanes, of which sums are blocks of."""

    strategy: ClassVar[str] = "blocks_in_lanes"

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """Pairs of bfloat16, which copies are made of that all rows of a tile share, and no function of scores."""
        spec = basis.spec
        if not (basis.target.dot_blocks and basis.dot_pairs and basis.fused):
            return False, "blocks of bfloat16 are multiplied on CPUs with bfmmla alone."
        if spec.kv_layout == "packed" and spec.kv_dtype is not None:
            return False, "packed codes are converted where tokens lie in lanes."
        if spec.functions:
            return False, "functions of scores may hide values, which blocks multiply."
        return True, "bfmmla multiplies blocks of bfloat16."
