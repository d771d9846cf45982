"""The arrays of a case, in memory of a chosen page size: the same for every contender, made anew in each process."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np

from pa_compiler.verification.cases import Case

_PIECE = 1 << 20  # elements


def empty(shape: tuple[int, ...], dtype: np.dtype, huge_pages: bool) -> np.ndarray:
    """An array in memory of its own, on transparent huge pages where they are asked for and the system has them."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:size].view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of decode.

    Attributes:
        case: What is called.
        num_threads: Threads to use.
        huge_pages: Whether keys and values lie on huge pages; whoever copies them keeps to it.
        query: [batch, num_heads, head_dim], dtype.
        key_cache: NHD [num_blocks, block_size, num_kv_heads, head_dim], dtype.
        value_cache: As key_cache.
        block_table: int32 [batch, max_blocks]; blocks in random order, each used once.
        context_lens: int32 [batch].
    """

    case: Case
    num_threads: int
    huge_pages: bool
    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray
    block_table: np.ndarray
    context_lens: np.ndarray

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | None = None) -> np.ndarray:
        """Memory for keys or values in another layout or dtype, on the same kind of pages."""
        return empty(shape, dtype or self.query.dtype, self.huge_pages)

    def contiguous(self, cache: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """A cache as [batch, num_kv_heads, longest, head_dim], tokens in order, zeros past a sequence's end."""
        spec = self.case.spec
        longest = int(self.context_lens.max())
        array = self.empty((len(self.context_lens), spec.num_kv_heads, longest, spec.head_dim), dtype)
        for sequence, length in enumerate(self.context_lens):
            blocks = self.block_table[sequence, : -(-length // spec.block_size)]
            tokens = cache[blocks].reshape(-1, spec.num_kv_heads, spec.head_dim)[:length]
            array[sequence, :, :length] = tokens.swapaxes(0, 1)
        return array

    def slots(self) -> np.ndarray:
        """Of each cache slot that holds a token, its number block * block_size + offset: int64 [num_tokens]."""
        size = self.case.spec.block_size
        pieces = []
        for table, length in zip(self.block_table, self.context_lens, strict=True):
            token = np.arange(length)
            pieces.append(table[token // size].astype(np.int64) * size + token % size)
        return np.concatenate(pieces)


def make_call(case: Case, num_threads: int, huge_pages: bool, seed: int = 0) -> Call:
    """Make the arrays of a case: query and keys uniform in [-1, 1), values in [-1, 1)."""
    rng = np.random.default_rng(seed)
    spec = case.spec
    dtype = np.dtype(spec.dtype)

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        array = empty(shape, dtype, huge_pages)
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            piece[:] = rng.random(piece.size, dtype=np.float32) * np.float32(2) - np.float32(1)
        return array

    cache_shape = (case.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
    query = uniform((case.batch, spec.num_heads, spec.head_dim))
    key_cache, value_cache = uniform(cache_shape), uniform(cache_shape)
    counts = -(-case.context_lens // spec.block_size)
    block_table = np.full((case.batch, case.max_blocks), -1, np.int32)
    block_table[np.arange(case.max_blocks) < counts[:, None]] = rng.permutation(case.num_blocks)
    return Call(case, num_threads, huge_pages, query, key_cache, value_cache, block_table, case.context_lens)
