"""Tiles where a matrix unit multiplies rows of tokens as they lie in the cache: decode of bfloat16 on CPUs with AMX."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import TILES, Basis, CpuTiling
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import TILE_TOKENS, equal_tile, largest_divisor

_WORDS = 16
"""Words of a row of a tile."""

_BESIDE = 1 << 19
"""Bytes of keys and values of all heads of a step, at most, which the next step's are fetched beside."""


_SWEPT = 1 << 10
"""Elements of a token's keys, in all heads, from which on the hardware's prefetchers follow a sweep through them."""


@dataclasses.dataclass(frozen=True)
class RowsInTiles(CpuTiling):
    """Tiles of schedules/cpu/rows_in_tiles.py."""

    strategy: ClassVar[str] = "rows_in_tiles"
    in_tile_registers: ClassVar[bool] = True

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """Rows of tokens of bfloat16 in whole tiles, as many of them in each block, and no function of scores."""
        spec = basis.spec
        if not (spec.kv_layout != "packed" and basis.target.tile_registers and basis.dot_pairs and basis.fused):
            return False, "tile registers multiply bfloat16 on CPUs with AMX alone."
        if spec.kv_dtype is not None:
            return False, f"tile registers take no kv_dtype {spec.kv_dtype}."
        if spec.head_dim % (2 * _WORDS) or spec.result_dim % (2 * _WORDS) or spec.block_size % TILE_TOKENS:
            steps = f"head_dim and value_dim in steps of {2 * _WORDS}, and blocks in steps of {TILE_TOKENS} tokens"
            return False, f"tile registers take {steps}."
        if spec.functions:
            return False, "functions of scores may hide values, which tile registers multiply."
        if basis.sweep() is not None and (basis.rows == 1 or not _sweeps(spec)):
            return False, "the memory is the limit, and a sweep reads it faster than tile registers do."
        return True, "AMX multiplies rows of bfloat16 as they lie in the caches."

    @classmethod
    def choose(cls, basis: Basis) -> RowsInTiles:
        """Tiles of up to 16 rows, and steps of tokens that the second-level cache holds with all of their heads."""
        spec = basis.spec
        rows = equal_tile(basis.rows, _WORDS)
        of_token = 2 * spec.num_kv_heads * (spec.head_dim + (0 if spec.shared_kv else spec.result_dim))
        kv_tile = basis.machine.kv_tile
        while kv_tile > 2 * TILE_TOKENS and kv_tile * of_token > _BESIDE:
            kv_tile //= 2
        group = min(TILES * TILE_TOKENS, kv_tile)
        blocks = TILES if 2 * rows <= _WORDS else TILES // 2
        return cls(
            **{
                **basis.common(group, "tokens" if _sweeps(spec) else None),
                "row_tile": rows,
                "kv_tile": kv_tile,
                "values": dataclasses.replace(basis.values, halves=1),
                "pv_lanes": basis.target.vector_lanes,
            },
            copy_keys=False,
            copy_values=False,
            streams=1,
            qk_rows=rows,
            qk_tokens=group,
            pv_rows=1,
            pv_dims=largest_divisor(spec.result_dim // basis.target.vector_lanes, 8) * basis.target.vector_lanes,
            rows_in_place=True,
            value_dims=largest_divisor(spec.result_dim // (2 * _WORDS), blocks) * 2 * _WORDS,
        )


def _sweeps(spec: PagedAttentionSpec) -> bool:
    """Whether a token's rows are so long that tokens are read in the order in which they lie."""
    return spec.kv_layout == "NHD" and spec.num_kv_heads * spec.head_dim >= _SWEPT
