"""Tiles where a matrix unit multiplies, with its sums in tile registers: attend of bfloat16 on CPUs with AMX."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import TILES, Basis, CpuTiling
from pa_compiler.cpu.tiles.tokens_in_tiles import TokensInTiles
from pa_compiler.key_ranges import ATTEND_KV_TILE, decodes_in_step
from pa_compiler.spec import PACKED_TOKENS
from pa_compiler.tiles import divisors

_PAIRS, _SUMS = 16, 16 * TILES
"""Pairs that an instruction adds up, and rows of sums of a block (schedules/intrinsics/tile_products.py)."""


@dataclasses.dataclass(frozen=True)
class InTileRegisters(CpuTiling):
    """Tiles of schedules/cpu/in_tile_registers.py."""

    strategy: ClassVar[str] = "in_tile_registers"
    in_tile_registers: ClassVar[bool] = True

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """Whole tiles of pairs of bfloat16."""
        spec = basis.spec
        if not (basis.target.tile_registers and basis.dot_pairs and basis.fused):
            return False, "tile registers multiply bfloat16 on CPUs with AMX alone."
        if spec.kv_dtype is not None:
            return False, f"tile registers take no kv_dtype {spec.kv_dtype}."
        if spec.head_dim % (2 * _PAIRS) or spec.result_dim % _SUMS:
            return False, f"tile registers take head_dim in steps of {2 * _PAIRS}, value_dim in steps of {_SUMS}."
        return True, "AMX multiplies whole tiles of bfloat16."

    @staticmethod
    def adds_as(in_place: TokensInTiles) -> bool:
        """Whether copies of packed keys and values are added up as they are where they lie, so that bits are alike."""
        return in_place.value_pairs == _PAIRS

    @classmethod
    def choose(cls, basis: Basis) -> InTileRegisters:
        """Copies of keys and values of a tile that fit in the second-level cache, in whole blocks of sums."""
        spec, rows = basis.spec, 2 * basis.rows
        bytes_of_token = 2 * (spec.head_dim + spec.result_dim)
        most = max(basis.machine.attend_bytes // bytes_of_token, _SUMS)
        kv_tile = max(tile for tile in divisors(ATTEND_KV_TILE) if tile <= most)
        return cls(
            **{**basis.common(_SUMS, None), "row_tile": rows, "kv_tile": kv_tile, "prefetches": True},
            copy_keys=True,
            copy_values=True,
            streams=1,
            attends=True,
            many_tokens=True,
            few_rows=basis.rows,
            fetches_early=spec.kv_layout != "packed",
            weight_sums=math.gcd(_SUMS, PACKED_TOKENS) if decodes_in_step(spec) else 0,
            qk_rows=rows,
            qk_tokens=_SUMS // 2,
            pv_rows=rows,
            pv_dims=_SUMS // 2,
        )
