"""The policy of the CUDA target: warps, stages and tiles, chosen from the spec and the GPU's architecture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from pa_compiler.cuda import gpus
from pa_compiler.cuda.strategies import (
    MAX_ROW_TILE,
    FmaTile,
    choose_strategy,
    fitting,
    fma_tiles,
    mask_by_head,
    registers,
    tile_tokens,
    weights_leave_range,
)
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.cuda.tiles import MMA_HEADS, CudaTiling, Element, FmaTiling, TensorCoreTiling, fence
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Element as WordElement
from pa_compiler.tiles import Tiling, equal_tile

MAX_HEAD_DIM = 256
"""Elements of a key and of a value, at most: the sums of 16 heads then still fit in a thread's registers."""

ACC_REGISTERS = 150
"""Registers of a lane for its parts of the query and of acc, at most, where tensor cores multiply 16 rows of attend."""

SIGHT_REGISTERS = 14
"""Registers of a lane, about, for what each row of attend sees (kernels/sight.py)."""

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
"""Tokens of a range, at least: below this it would not be worth the merge of its result."""

RANGE_BLOCKS = 128
"""Thread blocks that a sequence of 4096 tokens has where it is cut into ranges longer than that: one for each SM of a
large GPU, about. Longer ranges cost fewer partial results."""

SEQUENCE_BLOCKS = 512
"""Thread blocks that a sequence has, about, however long it is: as many as a large GPU runs at once."""

MIN_RANGES = 32
"""Ranges that a long sequence has nevertheless."""

CODES = ("int8", "float8_e4m3fn", "float8_e5m2")
"""The types of codes that the kernels read and append_kv makes, in the fused pipeline."""

INSTRUCTION_OF_FLOAT8 = 89
"""The compute capability, times ten, from which on GPUs have an instruction that makes float16 of float8."""

WAVES = 2
"""How often the workers of a launch fill the GPU: more even out sequences of different lengths."""

STAGED_BLOCK_SIZE = 2048
"""Tokens of a block, at most, in the staged pipeline: their places and the query share 48 KB of shared memory."""


def choose(spec: PagedAttentionSpec, arch: str) -> CudaTiling:
    """Choose the tiles of decode for one spec on an architecture such as "sm_90".

    Raises:
        ValueError: CUDA has no kernel for the spec.
    """
    check(spec)
    if choose_strategy(spec)[0] == FmaTiling.strategy:
        return _fma(spec, arch, fma_tiles(spec)[0])
    return _tensor_cores(spec, arch, equal_tile(spec.group, MAX_ROW_TILE))


def choose_attend(spec: PagedAttentionSpec, arch: str) -> CudaTiling:
    """Choose the tiles of attend, whose rows are pairs of a query token and a head: as many as a tile can have.

    16-bit types are multiplied by tensor cores, whatever the group, unless weights leave their range.

    Raises:
        ValueError: CUDA has no kernel for the spec.
    """
    check(spec)
    if spec.dtype != "float32" and not weights_leave_range(spec):
        return _tensor_cores(spec, arch, MAX_ROW_TILE if registers(spec, MAX_ROW_TILE) <= ACC_REGISTERS else MMA_HEADS)
    tiles = itertools.chain(fitting(spec, range(MAX_ROW_TILE, 0, -1), SIGHT_REGISTERS), fitting(spec, [1]))
    return _fma(spec, arch, next(tiles))


def _tensor_cores(spec: PagedAttentionSpec, arch: str, rows: int) -> CudaTiling:
    return _with_rings(spec, arch, TensorCoreTiling(row_tile=rows, **_sizes(spec, arch)))


def _fma(spec: PagedAttentionSpec, arch: str, tile: FmaTile) -> CudaTiling:
    rows, lanes, words = tile
    return _with_rings(spec, arch, FmaTiling(row_tile=rows, lanes=lanes, piece_words=words, **_sizes(spec, arch)))


def _sizes(spec: PagedAttentionSpec, arch: str) -> dict[str, Any]:
    """What does not go by the strategy."""
    element = Element(spec.cache_dtype, CudaTarget(arch).capability >= INSTRUCTION_OF_FLOAT8)
    return {"warps": 4, "stages": 2, "tile_tokens": tile_tokens(spec), "element": element, **range_sizes(spec)}


def _with_rings(spec: PagedAttentionSpec, arch: str, first: CudaTiling) -> CudaTiling:
    """As many warps, and then stages, as shared memory has room for."""
    candidates = (
        dataclasses.replace(first, warps=warps, stages=stages)
        for warps in (4, 2, 1)
        for stages in (4, 3, 2)
        if stages == 2 or dataclasses.replace(first, warps=warps, stages=stages).ring_bytes(spec) <= RING_BYTES
    )
    return next(tiling for tiling in candidates if tiling.shared_bytes(spec) <= gpus.shared_limit(arch))


def range_sizes(spec: PagedAttentionSpec) -> dict[str, int]:
    """range_tokens and most_ranges of a CudaTiling, which go by the spec alone, so that its results do."""
    head_tiles = spec.num_kv_heads * -(-spec.group // MAX_ROW_TILE)
    enough = 1 << (4096 * head_tiles // RANGE_BLOCKS).bit_length() - 1
    return {
        "range_tokens": max(MIN_RANGE_TOKENS, min(enough, 4096)),
        "most_ranges": max(MIN_RANGES, SEQUENCE_BLOCKS // head_tiles),
    }


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
    element = WordElement(spec.dtype)
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
    _check_codes(spec, pipeline)
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


def _check_codes(spec: PagedAttentionSpec, pipeline: str) -> None:
    if spec.has_scales and pipeline == "staged":
        raise ValueError(f"kv_dtype: expected {spec.dtype} for target cuda and pipeline staged, got {spec.kv_dtype!r}")
    if spec.has_scales and spec.kv_dtype not in CODES:
        types = ", ".join((spec.dtype, *CODES[:-1]))
        raise ValueError(f"kv_dtype: expected {types} or {CODES[-1]} for target cuda, got {spec.kv_dtype!r}")
    if spec.rotates:
        raise ValueError(f"kv_rotation: expected None or none for target cuda, got {spec.kv_rotation!r}")


def extra_workers(head_tiles: int, resident_blocks: int) -> int:
    """Workers more than sequences: as many as have their thread blocks within WAVES times what the GPU runs at once.

    Rounded down, but to one at least: the few blocks of one worker more would take a round of the GPU of their own. The
    host computes the same when it sees a GPU (ExtraWorkers in templates/cuda/device.h).

    Args:
        head_tiles: CudaTiling.head_tiles.
        resident_blocks: Thread blocks of cuda_decode that the GPU runs at once.
    """
    return max(1, WAVES * resident_blocks // head_tiles)


def ranges(spec: PagedAttentionSpec, tiling: CudaTiling, context_lens: Sequence[int]) -> list[int]:
    """How many ranges each sequence is cut into, as the kernels find it (kernels/plan.py), but for a mask's bounds."""
    counts = []
    for length in context_lens:
        first = max(length - spec.window, 0) if spec.window else 0
        doublings = (max(length - first - 1, 0) // (tiling.range_tokens * tiling.most_ranges)).bit_length()
        tokens = tiling.range_tokens << doublings
        counts.append((length - 1) // tokens - first // tokens + 1 if length else 1)
    return counts
