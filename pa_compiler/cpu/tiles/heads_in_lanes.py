"""Tiles where the rows of a head tile lie in the lanes of a vector register: for whole vectors of query heads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import Basis, CpuTiling
from pa_compiler.tiles import largest_divisor


@dataclasses.dataclass(frozen=True)
class HeadsInLanes(CpuTiling):
    """Tiles of schedules/cpu/heads_in_lanes.py."""

    strategy: ClassVar[str] = "heads_in_lanes"

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """Whole vectors of rows, as many as have their sums in registers, in the fused pipeline."""
        rows, lanes, sums = basis.rows, basis.target.vector_lanes, basis.target.vector_sums
        if not basis.fused:
            return False, f"It is the one strategy of pipeline {basis.pipeline} for kv_layout {basis.spec.kv_layout}."
        if basis.dot_fours:
            return False, "kv_dots int8 multiplies four elements of head_dim at a time, in lanes side by side."
        tile = f"{rows} query head{'' if rows == 1 else 's'} in a tile"
        if rows < basis.machine.heads_in_lanes:
            return False, f"{tile}: heads lie in lanes from {basis.machine.heads_in_lanes} on."
        if rows % lanes:
            return False, f"{tile}: not whole vectors of {lanes}."
        if rows > sums * lanes:
            return False, f"{tile}: more than {sums} vectors of {lanes}, whose sums fit in registers."
        pairs = max(sums, basis.target.vector_registers // 2) // 2
        if basis.values.terms == 2 and rows > pairs * lanes:
            return False, f"{tile}: more than {pairs} vectors of {lanes}, whose sums of two tokens fit in registers."
        return True, f"{tile}: whole vectors of {lanes}, and {basis.machine.heads_in_lanes} or more."

    @classmethod
    def choose(cls, basis: Basis) -> HeadsInLanes:
        """All rows of a tile, and as many tokens, or elements of value_dim, as have their sums in half the registers.

        A power of two of them, up to 8: rows of 16 tokens that lie a multiple of 4096 bytes apart would fill two sets
        of a first-level cache. At least one, and two where a product is of two tokens: a group is of whole products.
        """
        most = basis.target.vector_registers // 2 // (basis.rows // basis.target.vector_lanes)
        tokens = max(min(1 << most.bit_length() >> 1, 8), basis.values.terms)
        return cls(
            **basis.common(tokens, None),
            copy_keys=not basis.as_they_lie,
            copy_values=basis.keys.dtype != "float32",
            streams=1,
            qk_rows=basis.rows,
            qk_tokens=tokens,
            pv_rows=basis.rows,
            pv_dims=largest_divisor(basis.spec.result_dim, tokens),
        )

    def pv_sums(self, vector_lanes: int) -> int:
        """Vector registers that the sums of pv_matmul take."""
        return -(-self.pv_rows * self.pv_dims // vector_lanes)
