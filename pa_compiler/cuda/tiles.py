"""The sizes that the CUDA kernels agree on, and what follows from them. tiling.py chooses them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec

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


def fence(value: Any) -> Any:
    """The same expression of float32, of which nothing is known that could be simplified; no instruction."""
    from tvm.script import tirx as T

    return T.cuda.uint_as_float(T.cuda.float_as_uint(value))


def merge_threads(spec: PagedAttentionSpec) -> int:
    """Threads of a block that merges: one for each element of a value, in whole warps."""
    return -(-spec.result_dim // WARP) * WARP


@dataclasses.dataclass(frozen=True)
class Element:
    """How an element of the caches lies in 32-bit words, and by what a code becomes a number: kernels/elements.py.

    Attributes:
        dtype: Its type in the caches.
        by_instruction: Whether the GPU has an instruction that makes float16 of float8.
    """

    dtype: str
    by_instruction: bool

    @property
    def of_word(self) -> int:
        """Elements of a word."""
        return 4 // ITEMSIZES[self.dtype]

    @property
    def is_code(self) -> bool:
        """Whether it is a code of 8 bits, with a scale beside it."""
        return self.of_word == 4


@dataclasses.dataclass(frozen=True)
class RingRows:
    """How the keys, or the values, of a tile lie in shared memory: a row for each token, of 16-byte chunks.

    Attributes:
        chunks: Of a row, that are read.
        pitch: Chunks from a row to the next.
        swizzled: Whether the chunks of a row change places with its number, for ldmatrix.
    """

    chunks: int
    pitch: int
    swizzled: bool


@dataclasses.dataclass(frozen=True)
class CudaTiling:
    """Sizes that the CUDA kernels agree on.

    A thread block takes one work item, a range of a sequence's tokens, and one tile of the query heads of one kv head.
    Its warps take tiles of tokens in turn, each through a ring of its own in shared memory, and join their results at
    the end. Each strategy, by which a warp computes a tile, has a class of its own.

    Attributes:
        strategy: The strategy's name, by which decode.py has its kernel.
        row_tile: Query heads of a thread block: the group in equal tiles of up to 16.
        warps: Of a thread block.
        stages: Tiles of a warp's ring: one is computed while the others are fetched.
        tile_tokens: Tokens of such a tile.
        range_tokens: Tokens of a range that a sequence is cut into, a power of two; a long one into ranges of twice as
            many, or four times, and so on.
        most_ranges: Ranges of that number of keys, at most.
        element: Of the caches.
    """

    strategy: ClassVar[str]

    row_tile: int
    warps: int
    stages: int
    tile_tokens: int
    range_tokens: int
    most_ranges: int
    element: Element

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def step_tokens(self) -> int:
        """Tokens that the warps of a block take together, each one tile."""
        return self.warps * self.tile_tokens

    def row_tiles(self, spec: PagedAttentionSpec) -> int:
        """Tiles of query heads that cover one group."""
        return -(-spec.group // self.row_tile)

    def head_tiles(self, spec: PagedAttentionSpec) -> int:
        """Tiles of query heads that cover all heads: the thread blocks of one work item."""
        return spec.num_kv_heads * self.row_tiles(spec)

    def chunk_elements(self, spec: PagedAttentionSpec) -> int:
        """Elements of a 16-byte chunk of a cache."""
        return CHUNK_BYTES // ITEMSIZES[spec.cache_dtype]

    def key_rows(self, spec: PagedAttentionSpec) -> RingRows:
        """How the keys of a tile lie in the ring."""
        return self._rows(chunks(spec, spec.head_dim))

    def value_rows(self, spec: PagedAttentionSpec) -> RingRows:
        """How the values of a tile lie in the ring; with shared_kv, they are the first chunks of the keys' rows."""
        count = chunks(spec, spec.result_dim)
        return dataclasses.replace(self.key_rows(spec), chunks=count) if spec.shared_kv else self._rows(count)

    def values_at(self, spec: PagedAttentionSpec) -> int:
        """32-bit words from the keys of a tile to its values: behind them, or with shared_kv in the same place."""
        return 0 if spec.shared_kv else self._words(self.key_rows(spec))

    def scales_at(self, spec: PagedAttentionSpec) -> int:
        """32-bit words from the keys of a tile to the scales of its keys, behind which are those of its values."""
        return self.values_at(spec) + self._words(self.value_rows(spec))

    def stage_words(self, spec: PagedAttentionSpec) -> int:
        """32-bit words of a tile's keys and values in the ring, with the scales that tokens have."""
        return self.scales_at(spec) + (2 * self.tile_tokens if spec.token_scales else 0)

    def ring_bytes(self, spec: PagedAttentionSpec) -> int:
        """Shared memory of the rings of a thread block's warps."""
        return self.warps * self.stages * self.stage_words(spec) * 4

    def acc_pitch(self, spec: PagedAttentionSpec) -> int:
        """float32 elements from a row of a warp's result to the next, where warps join theirs."""
        return spec.result_dim + 4

    def shared_bytes(self, spec: PagedAttentionSpec) -> int:
        """Dynamic shared memory of a thread block: the rings, and after them in the same place the warps' results."""
        joined = self.warps * self.row_tile * (self.acc_pitch(spec) + 2) * 4
        return max(self.ring_bytes(spec), joined)

    def _rows(self, count: int) -> RingRows:
        """Rows of so many chunks, of which no eight that are read at once meet in a bank."""
        raise NotImplementedError

    def _words(self, rows: RingRows) -> int:
        """32-bit words of a tile of such rows."""
        return self.tile_tokens * rows.pitch * CHUNK_WORDS


@dataclasses.dataclass(frozen=True)
class TensorCoreTiling(CudaTiling):
    """Sizes for tensor_core.py: mma.m16n8k16, of 16-bit types."""

    strategy: ClassVar[str] = "tensor_cores"

    @property
    def mma_tiles(self) -> int:
        """Tiles of 8 heads that cover row_tile."""
        return -(-self.row_tile // MMA_HEADS)

    def _rows(self, count: int) -> RingRows:
        """ldmatrix reads one chunk of eight rows: they are swizzled, or lie an odd number of chunks apart."""
        swizzled = count % BANK_CHUNKS == 0
        return RingRows(count, count if swizzled else count | 1, swizzled)


@dataclasses.dataclass(frozen=True)
class FmaTiling(CudaTiling):
    """Sizes for fma.py: float32 arithmetic, of all types.

    Attributes:
        lanes: Lanes that share a token.
        piece_words: 32-bit words that a lane reads at once: CHUNK_WORDS, or fewer where a row of codes has too few
            chunks for so many lanes.
    """

    strategy: ClassVar[str] = "fma"

    lanes: int
    piece_words: int

    @property
    def piece_elements(self) -> int:
        """Elements of these words."""
        return self.piece_words * self.element.of_word

    def _rows(self, count: int) -> RingRows:
        """Lanes read the chunks of one row side by side, or of several rows, an odd multiple of as many apart."""
        side = max(1, self.lanes * self.piece_words // CHUNK_WORDS)
        meet = side < BANK_CHUNKS and count // side % 2 == 0
        return RingRows(count, count + side if meet else count, False)


def chunks(spec: PagedAttentionSpec, dim: int) -> int:
    """16-byte chunks of dim elements of a cache."""
    return dim * ITEMSIZES[spec.cache_dtype] // CHUNK_BYTES


def copy_lanes(spec: PagedAttentionSpec) -> int:
    """Lanes that copy one row side by side: 8 where they divide it, for whole 128-byte lines of the caches."""
    return math.gcd(chunks(spec, spec.head_dim), chunks(spec, spec.result_dim), BANK_CHUNKS)
