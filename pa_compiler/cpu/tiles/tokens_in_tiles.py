"""Tiles where a matrix unit multiplies packed keys and values as they lie in the cache: bfloat16 on CPUs with AMX."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import TILES, Basis, CpuTiling
from pa_compiler.key_ranges import ATTEND_KV_TILE, decodes_in_step
from pa_compiler.spec import PACKED_TOKENS
from pa_compiler.tiles import divisors, equal_tile, largest_divisor

_PAIRS = _COLUMNS = 16
"""Pairs that an instruction adds up, at most, and columns of sums (schedules/intrinsics/tile_nests.py)."""


@dataclasses.dataclass(frozen=True)
class TokensInTiles(CpuTiling):
    """Tiles of schedules/cpu/tokens_in_tiles.py."""

    strategy: ClassVar[str] = "tokens_in_tiles"
    in_tile_registers: ClassVar[bool] = True

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """Pairs of bfloat16 in whole tiles, and token groups that begin where blocks have them begin."""
        spec = basis.spec
        if not (spec.kv_layout == "packed" and basis.target.tile_registers and basis.dot_pairs and basis.fused):
            return False, "tile registers multiply packed bfloat16 on CPUs with AMX alone."
        if spec.kv_dtype is not None:
            return False, f"tile registers take no kv_dtype {spec.kv_dtype}."
        if spec.head_dim % (2 * _PAIRS) or spec.result_dim % _COLUMNS:
            return False, f"tile registers take head_dim in steps of {2 * _PAIRS}, value_dim in steps of {_COLUMNS}."
        if not decodes_in_step(spec):
            return False, "tile registers take whole steps of tokens from the first position on."
        return True, "AMX multiplies packed bfloat16 as it lies in the caches."

    @classmethod
    def choose(cls, basis: Basis) -> TokensInTiles:
        """Tiles of up to 16 rows; a step of pairs of tokens lies in one block."""
        spec = basis.spec
        rows = equal_tile(basis.rows, _COLUMNS)
        group = TILES * _COLUMNS
        return cls(
            **{**basis.common(group, None), "row_tile": rows},
            copy_keys=False,
            copy_values=False,
            streams=1,
            qk_rows=rows,
            qk_tokens=group,
            pv_rows=1,
            pv_dims=largest_divisor(spec.result_dim // basis.pv_lanes, 8) * basis.pv_lanes,
            value_pairs=math.gcd(spec.block_size // 2, _PAIRS),
            value_dims=largest_divisor(spec.result_dim // _COLUMNS, TILES) * _COLUMNS,
            weight_sums=PACKED_TOKENS,
        )

    @classmethod
    def choose_attend(cls, basis: Basis) -> TokensInTiles:
        """The same of rows that are pairs of a query token and a head, in steps that the second-level cache holds."""
        spec, group = basis.spec, TILES * _COLUMNS
        most = max(basis.machine.attend_bytes // (2 * (spec.head_dim + spec.result_dim)), group)
        kv_tile = max(tile for tile in divisors(ATTEND_KV_TILE) if tile <= most)
        return dataclasses.replace(cls.choose(basis), kv_tile=kv_tile, prefetches=True, attends=True, many_tokens=True)
