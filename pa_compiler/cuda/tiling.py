"""The policy of the CUDA target: warps, stages and tiles, chosen from the spec and the GPU's architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from pa_compiler.cuda import gpus
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import Element, Tiling, equal_tile

WARP = 32
"""Threads of a warp."""

CHUNK_BYTES = 16
"""Bytes that one asynchronous copy moves, and that one shared-memory access of a thread reads."""

CHUNK_WORDS = 4
"""32-bit words of such a chunk."""

BANK_CHUNKS = 8
"""Chunks that the banks of shared memory serve at once, to 8 lanes: they must not meet in a bank."""

MMA_TOKENS = 16
"""Tokens of one mma.m16n8k16 in both matmuls: its rows in QK, its depth in PV."""

MMA_HEADS = 8
"""Query heads of one mma.m16n8k16."""

MAX_HEAD_DIM = 256
"""Elements of a head, at most: the sums of 16 heads then still fit in a thread's registers."""

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


@dataclasses.dataclass(frozen=True)
class CudaTiling:
    """Sizes that the CUDA kernels agree on.

    A thread block takes one work item, a range of a sequence's tokens, and one tile of the query heads of one kv head.
    Its warps take tiles of tokens in turn, each through a ring of its own in shared memory, and join their results at
    the end.

    Attributes:
        strategy: "tensor_cores" (mma.m16n8k16, 16-bit types) or "fma" (float32 arithmetic).
        row_tile: Query heads of a thread block: the group in equal tiles of up to 16.
        warps: Of a thread block.
        stages: Tiles of a warp's ring: one is computed while the others are fetched.
        tile_tokens: Tokens of such a tile.
        lanes: Lanes that share a token, for strategy "fma"; 32 for "tensor_cores", where a warp works as one.
        min_range_steps: The shortest range that a sequence is cut into, in steps.
    """

    strategy: str
    row_tile: int
    warps: int
    stages: int
    tile_tokens: int
    lanes: int
    min_range_steps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def step_tokens(self) -> int:
        """Tokens that the warps of a block take together, each one tile: the unit in which sequences are cut."""
        return self.warps * self.tile_tokens

    @property
    def mma_tiles(self) -> int:
        """Tiles of 8 heads that cover row_tile."""
        return -(-self.row_tile // MMA_HEADS)

    def merge_threads(self, spec: PagedAttentionSpec) -> int:
        """Threads of a block of the merge: one for each element of head_dim, up to 128."""
        return min(-(-spec.head_dim // WARP) * WARP, 128)

    def row_tiles(self, spec: PagedAttentionSpec) -> int:
        """Tiles of query heads that cover one group."""
        return -(-spec.group // self.row_tile)

    def head_tiles(self, spec: PagedAttentionSpec) -> int:
        """Tiles of query heads that cover all heads: the thread blocks of one work item."""
        return spec.num_kv_heads * self.row_tiles(spec)

    def chunks(self, spec: PagedAttentionSpec) -> int:
        """16-byte chunks of a key or a value."""
        return spec.head_dim * ITEMSIZES[spec.dtype] // CHUNK_BYTES

    def chunk_elements(self, spec: PagedAttentionSpec) -> int:
        """Elements of such a chunk."""
        return CHUNK_BYTES // ITEMSIZES[spec.dtype]

    def pitch(self, spec: PagedAttentionSpec) -> int:
        """Chunks from a row of the ring to the next: an odd number for ldmatrix, where they are not swizzled."""
        chunks = self.chunks(spec)
        return chunks if self.strategy == "fma" or chunks % BANK_CHUNKS == 0 else chunks | 1

    def swizzled(self, spec: PagedAttentionSpec) -> bool:
        """Whether the chunks of a row change places with its number, for ldmatrix."""
        return self.strategy == "tensor_cores" and self.chunks(spec) % BANK_CHUNKS == 0

    def tile_bytes(self, spec: PagedAttentionSpec) -> int:
        """Bytes of one tile of keys, or of values, in the ring."""
        return self.tile_tokens * self.pitch(spec) * CHUNK_BYTES

    def tile_words(self, spec: PagedAttentionSpec) -> int:
        """32-bit words of such a tile."""
        return self.tile_bytes(spec) // 4

    def acc_pitch(self, spec: PagedAttentionSpec) -> int:
        """float32 elements from a row of a warp's result to the next, where warps join theirs."""
        return spec.head_dim + 4

    def shared_bytes(self, spec: PagedAttentionSpec) -> int:
        """Dynamic shared memory of a thread block: the rings, and after them in the same place the warps' results."""
        ring = 2 * self.warps * self.stages * self.tile_bytes(spec)
        rows = self.mma_tiles * MMA_HEADS if self.strategy == "tensor_cores" else self.row_tile
        joined = self.warps * rows * (self.acc_pitch(spec) + 2) * 4
        return max(ring, joined)


def choose(spec: PagedAttentionSpec, arch: str) -> CudaTiling:
    """Choose the tiles for one spec on an architecture such as "sm_90".

    Raises:
        ValueError: CUDA has no kernel for the spec.
    """
    check(spec)
    strategy, _ = choose_strategy(spec)
    rows, lanes = equal_tile(spec.group, MAX_ROW_TILE), WARP
    if strategy == "fma":
        rows, lanes = fma_tiles(spec)[0]
    first = CudaTiling(
        strategy=strategy,
        row_tile=rows,
        warps=4,
        stages=2,
        tile_tokens=_tile_tokens(spec),
        lanes=lanes,
        min_range_steps=1,
    )
    candidates = (
        dataclasses.replace(first, warps=warps, stages=stages)
        for warps in (4, 2, 1)
        for stages in (4, 3, 2)
        if stages == 2 or 2 * warps * stages * first.tile_bytes(spec) <= RING_BYTES
    )
    tiling = next(tiling for tiling in candidates if tiling.shared_bytes(spec) <= gpus.shared_limit(arch))
    return dataclasses.replace(tiling, min_range_steps=-(-MIN_RANGE_TOKENS // tiling.step_tokens))


@dataclasses.dataclass(frozen=True)
class ThreadsTiling(Tiling):
    """Sizes of the staged pipeline, of which nothing is tuned: schedules/cuda/threads.py."""

    strategy: ClassVar[str] = "cuda_threads"


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
    if spec.head_dim % 16 or spec.head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim: expected a multiple of 16 up to {MAX_HEAD_DIM} for target cuda, got {spec.head_dim}"
        )
    if pipeline == "staged" and spec.block_size > STAGED_BLOCK_SIZE:
        raise ValueError(
            f"block_size: expected up to {STAGED_BLOCK_SIZE} for target cuda and pipeline staged, got {spec.block_size}"
        )


def choose_strategy(spec: PagedAttentionSpec) -> tuple[str, str]:
    """CudaTiling.strategy, and the reason in one sentence."""
    if spec.dtype == "float32":
        return "fma", "Tensor cores would round float32."
    heads = f"{spec.group} query head{'' if spec.group == 1 else 's'} for a kv head"
    if spec.group > FMA_GROUP:
        return "tensor_cores", f"{heads}: more than {FMA_GROUP}."
    if not fma_tiles(spec):
        return "tensor_cores", f"{heads}, but in float32 a head_dim of {spec.head_dim} would take too many registers."
    return "fma", f"{heads}: up to {FMA_GROUP} leave most of a tensor core's 8 columns empty."


def fma_tiles(spec: PagedAttentionSpec) -> list[tuple[int, int]]:
    """Tiles (row_tile, lanes) for strategy "fma" whose registers suffice; the most rows first, then the fewest lanes.

    Fewer lanes take fewer shuffles for a score. 16-bit types take a group as a whole or not at all: in tiles, they
    are read for each.
    """
    chunks, tokens = spec.head_dim * ITEMSIZES[spec.dtype] // CHUNK_BYTES, _tile_tokens(spec)
    limits = range(MAX_ROW_TILE, 0, -1) if spec.dtype == "float32" else (FMA_GROUP,)
    return [
        (rows, lanes)
        for rows in dict.fromkeys(equal_tile(spec.group, limit) for limit in limits)
        for lanes in (copy_lanes(chunks), 16, 32)
        if chunks % lanes == 0 and rows * (2 * spec.head_dim + tokens * lanes * lanes // WARP) <= FMA_REGISTERS * lanes
    ]


def copy_lanes(chunks: int) -> int:
    """Lanes that copy one row side by side: 8 where they divide it, for whole 128-byte lines of the caches."""
    return math.gcd(chunks, BANK_CHUNKS)


def extra_items(head_tiles: int, resident_blocks: int) -> int:
    """Work items more than sequences: as many as have their thread blocks within WAVES times what the GPU runs at once.

    Rounded down, but to one at least: a long sequence then takes WAVES rounds of the GPU, where the few blocks of one
    item more would take a round of their own. The host computes the same when it sees a GPU (ExtraItems in
    templates/cuda_device.cc.j2).

    Args:
        head_tiles: CudaTiling.head_tiles.
        resident_blocks: Thread blocks of cuda_decode that the GPU runs at once.
    """
    return max(1, WAVES * resident_blocks // head_tiles)


def ranges(tiling: CudaTiling, context_lens: Sequence[int], extra: int) -> list[int]:
    """How many ranges each sequence is cut into, as the kernels find it (kernels/cuda_plan.py)."""
    steps = [-(-length // tiling.step_tokens) for length in context_lens]
    longest = max(-(-sum(steps) // extra), tiling.min_range_steps)
    return [max(1, -(-count // longest)) for count in steps]


def _tile_tokens(spec: PagedAttentionSpec) -> int:
    """Of a warp: one mma, or as many bytes."""
    return MMA_TOKENS * 2 // ITEMSIZES[spec.dtype]
