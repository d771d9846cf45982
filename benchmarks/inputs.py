"""The arrays of a case, in memory of a chosen page size: the same for every contender, made anew in each process."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pa_compiler.runtime import memory
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

_CHECKED = 64  # query tokens of a call, about: float64 takes 0.1 s for one with 8192 keys


def empty(shape: Sequence[int], dtype: np.dtype, huge_pages: bool) -> np.ndarray:
    """An array in memory of its own, on transparent huge pages where they are asked for and the system has them."""
    return memory.huge_zeros(shape, dtype, mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)


class Rows(NamedTuple):
    """Some of the query tokens of a call, as arrays [rows].

    Attributes:
        row: Its number in query.
        sequence: Its sequence.
        length: Keys that it sees, itself among them: a call of decode with such a context has the same result.
    """

    row: np.ndarray
    sequence: np.ndarray
    length: np.ndarray


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of decode, or of attend where the case has query_lens.

    Attributes:
        case: What is called.
        num_threads: Threads to use.
        huge_pages: Whether keys and values lie on huge pages; whoever copies them keeps to it.
        query: [query tokens, num_heads, head_dim], dtype; decode has one token of each sequence.
        key_cache: NHD [num_blocks, block_size, num_kv_heads, head_dim], dtype.
        value_cache: NHD [num_blocks, block_size, num_kv_heads, value_dim], dtype; None for shared_kv.
        block_table: int32 [batch, max_blocks]; blocks in random order, each used once.
        context_lens: int32 [batch].
    """

    case: Case
    num_threads: int
    huge_pages: bool
    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray | None
    block_table: np.ndarray
    context_lens: np.ndarray

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
        """The arrays in decode's order."""
        return self.query, self.key_cache, self.value_cache, self.block_table, self.context_lens

    @property
    def starts(self) -> np.ndarray:
        """int32 [batch + 1]: where the query tokens of each sequence begin, as attend's query_start_loc."""
        return np.concatenate([[0], np.cumsum(self.case.query_counts)]).astype(np.int32)

    @property
    def values(self) -> np.ndarray:
        """value_cache, or the view of key_cache that the values are."""
        return self.key_cache[..., : self.case.spec.result_dim] if self.value_cache is None else self.value_cache

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """[query tokens, num_heads, value_dim]."""
        return (*self.query.shape[:2], self.case.spec.result_dim)

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return 1 / math.sqrt(self.case.spec.head_dim) if self.case.scale is None else self.case.scale

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | None = None) -> np.ndarray:
        """Memory for keys or values in another layout or dtype, on the same kind of pages."""
        return empty(shape, dtype or self.query.dtype, self.huge_pages)

    def contiguous(self, cache: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """A cache as [batch, num_kv_heads, longest, its last axis], tokens in order, zeros past a sequence's end."""
        spec = self.case.spec
        longest = int(self.context_lens.max())
        array = self.empty((len(self.context_lens), spec.num_kv_heads, longest, cache.shape[-1]), dtype)
        for sequence, length in enumerate(self.context_lens):
            blocks = self.block_table[sequence, : -(-length // spec.block_size)]
            tokens = cache[blocks].reshape(-1, *cache.shape[2:])[:length]
            array[sequence, :, :length] = tokens.swapaxes(0, 1)
        return array

    def checked(self, seed: int = 0) -> Rows:
        """The query tokens whose results are compared: the first and the last of each sequence, and some at random."""
        starts, counts = self.starts[:-1], self.case.query_counts
        ends = np.concatenate([starts, starts + counts - 1])
        others = np.random.default_rng(seed).permutation(len(self.query))[: max(0, _CHECKED - len(self.context_lens))]
        row = np.unique(np.concatenate([ends, others]))
        sequence = np.searchsorted(starts, row, side="right") - 1
        length = self.context_lens[sequence] - counts[sequence] + (row - starts[sequence]) + 1
        return Rows(row, sequence, length.astype(np.int32))

    def newest(self, cache: np.ndarray) -> np.ndarray:
        """What a cache has of the query tokens: [query tokens, num_kv_heads, its last axis]."""
        firsts = np.concatenate([[0], np.cumsum(self.context_lens)[:-1]])
        pieces = [
            np.arange(first + length - count, first + length)
            for first, length, count in zip(firsts, self.context_lens, self.case.query_counts, strict=True)
        ]
        return cache.reshape(-1, *cache.shape[2:])[self.slots()[np.concatenate(pieces)]]

    def slots(self) -> np.ndarray:
        """Of each cache slot that holds a token, its number block * block_size + offset: int64 [num_tokens]."""
        size = self.case.spec.block_size
        pieces = []
        for table, length in zip(self.block_table, self.context_lens, strict=True):
            token = np.arange(length)
            pieces.append(table[token // size].astype(np.int64) * size + token % size)
        return np.concatenate(pieces)


def make_call(case: Case, num_threads: int, huge_pages: bool, seed: int = 0) -> Call:
    """Make the arrays of a case, as cases.make_inputs does; blocks lie in random order, each used once."""
    spec = case.spec
    shapes = [(case.num_blocks, *shape[1:]) for shape in (spec.key_cache_shape, spec.value_cache_shape)]
    dtype = np.dtype(spec.dtype)
    keys = empty(shapes[0], dtype, huge_pages)
    values = None if spec.shared_kv else empty(shapes[1], dtype, huge_pages)
    inputs = cases.make_inputs(case, seed, caches=(keys, values))
    return Call(case, num_threads, huge_pages, *inputs._replace(block_table=cases.distinct_blocks(case, seed)))
