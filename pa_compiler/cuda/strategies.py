"""Which strategy the CUDA target has for a spec, and why; and tiles that a lane's registers suffice for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pa_compiler import score
from pa_compiler.bounds import residual_mask
from pa_compiler.cuda.tiles import BANK_CHUNKS, CHUNK_WORDS, MMA_HEADS, MMA_TOKENS, WARP, chunks, copy_lanes
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import equal_tile

MAX_ROW_TILE = 16
"""Query heads of one thread block, at most."""

FMA_GROUP = 3
"""Query heads of a kv head up to which 16-bit types are multiplied in float32."""

FMA_REGISTERS = 144
"""float32 numbers that a lane keeps where float32 is multiplied, at most: its parts of the query and of acc, and the
scores of a tile. ptxas takes some 80 registers more."""


FEW_REGISTERS = 180
"""Registers of a lane for its parts of the query and of acc of 16 rows, from which on tensor cores have no room for the
scores of more tokens than one mma has."""


class FmaTile(NamedTuple):
    """FmaTiling's row_tile, lanes and piece_words."""

    rows: int
    lanes: int
    words: int


def choose_strategy(spec: PagedAttentionSpec) -> tuple[str, str]:
    """CudaTiling.strategy, and the reason in one sentence."""
    if spec.dtype == "float32":
        return "fma", "Tensor cores would round float32."
    if weights_leave_range(spec):
        return "fma", "Weights times the scales of tokens would leave float16's range."
    if mask_by_head(spec):
        return "fma", "The mask goes by the head, and a tensor core multiplies a value for all heads."
    heads = f"{spec.group} query head{'' if spec.group == 1 else 's'} for a kv head"
    if spec.group > FMA_GROUP:
        return "tensor_cores", f"{heads}: more than {FMA_GROUP}."
    if not fma_tiles(spec):
        dims = f"a head_dim of {spec.head_dim}"
        dims += f" and a value_dim of {spec.result_dim}" if spec.result_dim != spec.head_dim else ""
        return "tensor_cores", f"{heads}, but in float32 {dims} would take too many registers."
    return "fma", f"{heads}: up to {FMA_GROUP} leave most of a tensor core's 8 columns empty."


def mask_by_head(spec: PagedAttentionSpec) -> bool:
    """Whether heads see different keys, by what remains of mask_mod besides its bounds."""
    mask = residual_mask(spec)
    return mask is not None and any(part.op == "head" for part in score.parts(mask))


def weights_leave_range(spec: PagedAttentionSpec) -> bool:
    """Whether a tensor core would take weights in float16 that are multiplied by scales, of any float32."""
    return spec.dtype == "float16" and spec.token_scales


def fma_tiles(spec: PagedAttentionSpec) -> list[FmaTile]:
    """Tiles for strategy "fma" whose registers suffice; the most rows first, then the longest pieces.

    16-bit types take a group as a whole or not at all: in tiles, they are read for each, unless tensor cores cannot
    take them.
    """
    in_tiles = spec.dtype == "float32" or mask_by_head(spec) or weights_leave_range(spec)
    limits = range(MAX_ROW_TILE, 0, -1) if in_tiles else (FMA_GROUP,)
    return list(fitting(spec, dict.fromkeys(equal_tile(spec.group, limit) for limit in limits)))


def fitting(spec: PagedAttentionSpec, numbers: Iterable[int], of_row: int = 0) -> Iterator[FmaTile]:
    """Tiles whose registers suffice, of these numbers of rows; of each the longest pieces, then the fewest lanes first.

    Fewer lanes take fewer shuffles for a score. of_row: registers that a row takes besides.
    """
    dims, tokens = (spec.head_dim, spec.result_dim), tile_tokens(spec)
    scales = 2 * tokens if spec.token_scales else 0
    common = math.gcd(*(chunks(spec, dim) for dim in dims))
    return (
        FmaTile(rows, lanes, words)
        for rows in numbers
        for words in ((CHUNK_WORDS, 2, 1) if spec.has_scales else (CHUNK_WORDS,))
        for lanes in (math.gcd(common * CHUNK_WORDS // words, BANK_CHUNKS), 16, 32)
        if common * CHUNK_WORDS // words % lanes == 0
        and rows * (sum(dims) + tokens * lanes * lanes // WARP + of_row * lanes)
        <= (FMA_REGISTERS - scales * lanes // WARP) * lanes
    )


def tile_tokens(spec: PagedAttentionSpec) -> int:
    """Of a warp: one mma of 16-bit types, or as many bytes."""
    if spec.has_scales and registers(spec, MAX_ROW_TILE) > FEW_REGISTERS and WARP // copy_lanes(spec) <= MMA_TOKENS:
        return MMA_TOKENS
    return MMA_TOKENS * 2 // ITEMSIZES[spec.cache_dtype]


def registers(spec: PagedAttentionSpec, rows: int) -> int:
    """Registers of a lane for its parts of the query and of acc, where tensor cores multiply so many rows."""
    return -(-rows // MMA_HEADS) * (spec.head_dim // 16 * 2 + spec.result_dim // 16 * 4)
