"""The policy: the strategy, and the register and cache tiles, of a spec on a target. Schedules are the mechanism.

A strategy is a class in a file of its own, which says whether it is for a spec and chooses its tiles.
"""

from __future__ import annotations

import dataclasses
import math

from pa_compiler.cpu.target import CpuTarget
from pa_compiler.cpu.tiles.basis import Basis, CpuTiling, basis, rows
from pa_compiler.cpu.tiles.blocks_in_lanes import BlocksInLanes
from pa_compiler.cpu.tiles.head_dim_in_lanes import HeadDimInLanes
from pa_compiler.cpu.tiles.heads_in_lanes import HeadsInLanes
from pa_compiler.cpu.tiles.in_tile_registers import InTileRegisters
from pa_compiler.cpu.tiles.rows_in_tiles import RowsInTiles
from pa_compiler.cpu.tiles.tokens_in_lanes import TokensInLanes
from pa_compiler.cpu.tiles.tokens_in_tiles import TokensInTiles
from pa_compiler.key_ranges import ATTEND_KV_TILE, decodes_in_step
from pa_compiler.spec import ITEMSIZES, PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import divisors

STRATEGIES: tuple[type[CpuTiling], ...] = (
    TokensInTiles,
    RowsInTiles,
    TokensInLanes,
    HeadsInLanes,
    HeadDimInLanes,
)
"""In the order in which they are asked; the last takes what no other does."""

ATTEND_ROWS = 16
"""Rows, pairs of a query token and a query head, of a tile of attend, or of a vector of them."""

STAGED_ELEMENTS = 1 << 26
"""float32 numbers of an intermediate of the staged pipeline, at most: 256 MB, of which there are four."""


def check(spec: PagedAttentionSpec, pipeline: str) -> None:
    """Refuse a spec that a pipeline does not cover.

    Raises:
        ValueError: names the field, what the pipeline takes and what it got.
    """
    if pipeline == "staged" and spec.kv_dtype is not None:
        raise ValueError(f"kv_dtype: expected {spec.dtype} for pipeline staged, got {spec.kv_dtype!r}")
    of_sequence = rows(spec) * max(spec.block_size, spec.result_dim)
    if pipeline == "staged" and spec.batch_chunk * of_sequence > STAGED_ELEMENTS:
        sizes = f"{rows(spec)} heads, block_size = {spec.block_size} and value_dim = {spec.result_dim}"
        raise ValueError(
            f"batch_chunk: expected 1 to {STAGED_ELEMENTS // of_sequence} for pipeline staged with tiles of {sizes}, "
            f"got {spec.batch_chunk}"
        )


def choose(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str) -> CpuTiling:
    """Choose the tiles from the spec and the target's features alone."""
    known = basis(spec, target, pipeline)
    tiles = _strategy(known)[0].choose(known)
    if pipeline != "fused" or tiles.sweep or not decodes_in_step(spec):
        return tiles
    of_attend = choose_attend(spec, target)
    return dataclasses.replace(
        tiles,
        kv_tile=of_attend.kv_tile,
        token_group=min(tiles.token_group, of_attend.kv_tile),
        qk_tokens=min(tiles.qk_tokens, of_attend.kv_tile),
        weight_sums=of_attend.weight_sums,
    )


def choose_attend(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str = "fused") -> CpuTiling:
    """The tiles of attend: as many rows whatever the group is, which lie in lanes; staged, the tiles of decode.

    Values are copied once for many tiles of rows, so that strides of a cache cost nothing in the matmul, and keys where
    they are converted; not where they are packed, and so lie as they are read. Packed elements that have to be
    converted first are left to the strategy that has tokens in lanes.
    """
    if pipeline == "staged":
        return dataclasses.replace(choose(spec, target, pipeline), attends=True)
    known = basis(spec, target, "fused", "attend")
    known = known._replace(rows=ATTEND_ROWS, machine=known.machine._replace(sweep_intensity=0))  # attend has no sweep
    if TokensInTiles.takes(known)[0]:
        in_place = TokensInTiles.choose_attend(known)
        copies = InTileRegisters.takes(known)[0] and InTileRegisters.adds_as(in_place)
        return dataclasses.replace(InTileRegisters.choose(known), few_rows=0, few=in_place) if copies else in_place
    if InTileRegisters.takes(known)[0]:
        return InTileRegisters.choose(known)
    packed, as_they_lie = spec.kv_layout == "packed", known.as_they_lie
    in_blocks = BlocksInLanes.takes(known)[0]
    strategy: type[CpuTiling] = TokensInLanes if packed and not as_they_lie else HeadsInLanes
    strategy = BlocksInLanes if in_blocks else strategy
    if strategy is HeadsInLanes and not known.dot_pairs:
        known = known._replace(rows=ATTEND_ROWS * known.machine.attend_vectors)
    elements = spec.head_dim if spec.shared_kv else spec.head_dim + spec.result_dim
    copied = elements * (ITEMSIZES[spec.dtype] if known.dot_pairs else ITEMSIZES["float32"])
    most = known.machine.attend_bytes // (spec.cache_bytes(elements) if packed and not in_blocks else copied)
    tiles = strategy.choose(known)
    groups = 1 if strategy is TokensInLanes else 2  # of one alone, other schedules would find no loop over groups
    least = max(PACKED_TOKENS if decodes_in_step(spec) else 0, groups * tiles.token_group)
    kv_tile = max(tile for tile in divisors(ATTEND_KV_TILE) if tile <= max(most, least))
    few_rows = known.rows // 2 if strategy is not TokensInLanes and (as_they_lie or known.rows > ATTEND_ROWS) else 0
    weight_sums = 0
    if decodes_in_step(spec):  # every schedule takes whole groups of so many tokens
        weight_sums = math.gcd(tiles.token_group, PACKED_TOKENS)
    return dataclasses.replace(
        tiles,
        kv_tile=kv_tile,
        copy_keys=in_blocks or not (packed or as_they_lie),
        copy_values=in_blocks or not packed,
        prefetches=True,
        attends=True,
        many_tokens=True,
        few_rows=few_rows,
        few_groups=_few_groups(spec, tiles.token_group, kv_tile) if few_rows else 1,
        weight_sums=weight_sums,
    )


def _few_groups(spec: PagedAttentionSpec, token_group: int, kv_tile: int) -> int:
    """Tiling.few_groups: two, for as many bytes of sums as of whole tiles, while their keys take half of their L1 sets.

    Tokens whose rows lie a multiple of 4096 bytes apart share 8 lines of a first-level cache. The other half is for the
    query, and for the keys that are read next.
    """
    apart = spec.num_kv_heads * spec.head_dim * ITEMSIZES[spec.dtype] if spec.kv_layout == "NHD" else 0
    return 2 if kv_tile % (2 * token_group) == 0 and 2 * token_group * apart <= 4 * 4096 else 1


def choose_strategy(spec: PagedAttentionSpec, target: CpuTarget, pipeline: str) -> tuple[str, str]:
    """Tiling.strategy, and the reason in one sentence."""
    strategy, reason = _strategy(basis(spec, target, pipeline))
    return strategy.strategy, reason


def _strategy(known: Basis) -> tuple[type[CpuTiling], str]:
    """The first strategy that takes a spec. Why: its own reason, and the last one's is why those before do not."""
    reason = ""
    for strategy in STRATEGIES[:-1]:
        takes, reason = strategy.takes(known)
        if takes:
            return strategy, reason
    return STRATEGIES[-1], reason
