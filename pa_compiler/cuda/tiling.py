"""The policy of the CUDA target: warps, stages and tiles, chosen from the spec and the GPU's architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from pa_compiler import score
from pa_compiler.bounds import residual_mask
from pa_compiler.cuda import gpus
from pa_compiler.cuda.tiles import (
    MMA_TOKENS,
    WARP,
    CudaTiling,
    FmaTiling,
    TensorCoreTiling,
    chunks,
    copy_lanes,
    fence,
)
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import Element, Tiling, equal_tile

MAX_HEAD_DIM = 256
"""Elements of a key and of a value, at most: the sums of 16 heads then still fit in a thread's registers."""

MAX_ROW_TILE = 16
"""Query heads of one thread block, at most."""

FMA_GROUP = 3
"""Query heads of a kv head up to which 16-bit types are multiplied in float32."""

FMA_REGISTERS = 144
"""float32 numbers that a lane keeps where float32 is multiplied, at most: its parts of the query and of acc, and the
scores of a tile. ptxas takes some 80 registers more."""

RING_BYTES = 1 << 16
"""The rings of a thread block, where more than two stages fit: three such blocks share an SM of sm_90, two one of
sm_80, with more in flight than the 25 to 40 KB that cover its latency."""

APPEND_TOKENS = 4
"""Tokens of a thread block of append_kv: few, so that the tokens of one decode step spread over the GPU; more than
one, so that a prompt's slots are not compared once for every token."""

APPEND_THREADS = 256
"""Threads of such a block."""

CHECK_THREADS = 128
"""Threads of a block that checks indices."""

MIN_RANGE_TOKENS = 256
"""Below this a range would not be worth the merge of its result."""

WAVES = 2
"""How often the blocks of a launch fill the GPU: more even out sequences of different lengths, and merge more."""

STAGED_BLOCK_SIZE = 2048
"""Tokens of a block, at most, in the staged pipeline: their places and the query share 48 KB of shared memory."""


def choose(spec: PagedAttentionSpec, arch: str) -> CudaTiling:
    """Choose the tiles for one spec on an architecture such as "sm_90".

    Raises:
        ValueError: CUDA has no kernel for the spec.
    """
    check(spec)
    first: CudaTiling
    rows, tokens = equal_tile(spec.group, MAX_ROW_TILE), _tile_tokens(spec)
    if choose_strategy(spec)[0] == FmaTiling.strategy:
        rows, lanes = fma_tiles(spec)[0]
        first = FmaTiling(row_tile=rows, warps=4, stages=2, tile_tokens=tokens, min_range_steps=1, lanes=lanes)
    else:
        first = TensorCoreTiling(row_tile=rows, warps=4, stages=2, tile_tokens=tokens, min_range_steps=1)
    candidates = (
        dataclasses.replace(first, warps=warps, stages=stages)
        for warps in (4, 2, 1)
        for stages in (4, 3, 2)
        if stages == 2 or dataclasses.replace(first, warps=warps, stages=stages).ring_bytes(spec) <= RING_BYTES
    )
    tiling = next(tiling for tiling in candidates if tiling.shared_bytes(spec) <= gpus.shared_limit(arch))
    return dataclasses.replace(tiling, min_range_steps=-(-MIN_RANGE_TOKENS // tiling.step_tokens))


@dataclasses.dataclass(frozen=True)
class ThreadsTiling(Tiling):
    """Sizes of the staged pipeline, of which nothing is tuned: schedules/cuda/threads.py."""

    strategy: ClassVar[str] = "cuda_threads"
    fence = staticmethod(fence)


def staged(spec: PagedAttentionSpec) -> ThreadsTiling:
    """The sizes of the staged pipeline, whose kernels are the CPU's with a schedule of their own (cuda_threads).

    Raises:
        ValueError: CUDA has no kernel for the spec.
    """
    check(spec, "staged")
    element = Element(spec.dtype)
    return ThreadsTiling(
        row_tile=equal_tile(spec.group, min(spec.head_tile, MAX_ROW_TILE)),
        kv_tile=spec.block_size,
        token_group=1,
        keys=element,
        values=element,
        copy_keys=False,
        copy_values=False,
        sweep=None,
        streams=1,
        prefetches=False,
        split_blocks=1,
    )


def check(spec: PagedAttentionSpec, pipeline: str = "fused") -> None:
    """Refuse a spec that the CUDA kernels of a pipeline do not cover.

    Raises:
        ValueError: names the field, what the target takes and what it got.
    """
    if spec.kv_layout == "packed":
        raise ValueError("kv_layout: expected NHD or HND for target cuda, got 'packed'")
    if spec.invariant:
        raise ValueError("invariant: expected False for target cuda, got True")
    for name, dim in (("head_dim", spec.head_dim), ("value_dim", spec.result_dim)):
        if dim % 16 or dim > MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a multiple of 16 up to {MAX_HEAD_DIM} for target cuda, got {dim}")
    if pipeline == "fused" and mask_by_head(spec) and not fma_tiles(spec):
        raise ValueError(
            f"mask_mod: expected one that does not go by the head for target cuda with head_dim = {spec.head_dim} and "
            f"value_dim = {spec.result_dim}, got {spec.stated()['mask_mod']}"
        )
    if pipeline == "staged" and spec.block_size > STAGED_BLOCK_SIZE:
        raise ValueError(
            f"block_size: expected up to {STAGED_BLOCK_SIZE} for target cuda and pipeline staged, got {spec.block_size}"
        )


def choose_strategy(spec: PagedAttentionSpec) -> tuple[str, str]:
    """CudaTiling.strategy, and the reason in one sentence."""
    if spec.dtype == "float32":
        return "fma", "Tensor cores would round float32."
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


def fma_tiles(spec: PagedAttentionSpec) -> list[tuple[int, int]]:
    """Tiles (row_tile, lanes) for strategy "fma" whose registers suffice; the most rows first, then the fewest lanes.

    Fewer lanes take fewer shuffles for a score. 16-bit types take a group as a whole or not at all: in tiles, they
    are read for each, unless tensor cores cannot take them.
    """
    dims, tokens = (spec.head_dim, spec.result_dim), _tile_tokens(spec)
    common = math.gcd(*(chunks(spec, dim) for dim in dims))
    in_tiles = spec.dtype == "float32" or mask_by_head(spec)
    limits = range(MAX_ROW_TILE, 0, -1) if in_tiles else (FMA_GROUP,)
    return [
        (rows, lanes)
        for rows in dict.fromkeys(equal_tile(spec.group, limit) for limit in limits)
        for lanes in (copy_lanes(spec), 16, 32)
        if common % lanes == 0 and rows * (sum(dims) + tokens * lanes * lanes // WARP) <= FMA_REGISTERS * lanes
    ]


def extra_items(head_tiles: int, resident_blocks: int) -> int:
    """Work items more than sequences: as many as have their thread blocks within WAVES times what the GPU runs at once.

    Rounded down, but to one at least: a long sequence then takes WAVES rounds of the GPU, where the few blocks of one
    item more would take a round of their own. The host computes the same when it sees a GPU (ExtraItems in
    templates/cuda/device.h).

    Args:
        head_tiles: CudaTiling.head_tiles.
        resident_blocks: Thread blocks of cuda_decode that the GPU runs at once.
    """
    return max(1, WAVES * resident_blocks // head_tiles)


def ranges(spec: PagedAttentionSpec, tiling: CudaTiling, context_lens: Sequence[int], extra: int) -> list[int]:
    """How many ranges each sequence is cut into, as the kernels find it (kernels/plan.py)."""
    steps = [-(-min(length, spec.window or length) // tiling.step_tokens) for length in context_lens]
    longest = max(-(-sum(steps) // extra), tiling.min_range_steps)
    return [max(1, -(-count // longest)) for count in steps]


def _tile_tokens(spec: PagedAttentionSpec) -> int:
    """Of a warp: one mma, or as many bytes."""
    return MMA_TOKENS * 2 // ITEMSIZES[spec.dtype]
