"""Tiles where elements of head_dim lie in the lanes of a vector register: for any number of heads."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import Basis, CpuTiling, register_tile
from pa_compiler.tiles import divisors


@dataclasses.dataclass(frozen=True)
class HeadDimInLanes(CpuTiling):
    """Tiles of schedules/cpu/head_dim_in_lanes.py."""

    strategy: ClassVar[str] = "head_dim_in_lanes"
    scores_in_lanes: ClassVar[bool] = False

    @classmethod
    def choose(cls, basis: Basis) -> HeadDimInLanes:
        """Scores are summed a vector of a key at a time, for as many tokens as a vector has lanes."""
        token_group, sweep = basis.qk_lanes, basis.sweep()
        qk_rows, qk_tokens = register_tile(basis.rows, divisors(token_group), basis.target, basis.load_cost, 2)
        pv_rows, pv_dims = basis.pv_tile()
        common = basis.common(token_group, sweep)
        return cls(
            **common,
            copy_keys=False,
            copy_values=basis.dot_fours,
            streams=math.gcd(common["kv_tile"], basis.machine.streams) if sweep else 1,
            qk_rows=qk_rows,
            qk_tokens=qk_tokens,
            pv_rows=pv_rows,
            pv_dims=pv_dims,
        )
