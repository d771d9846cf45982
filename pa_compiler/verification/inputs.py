"""What the inputs of calls are made of: noise in a cache, and blocks anywhere in it.

Cases, draws, tests and benchmarks make theirs of these, each with the lengths, numbers and poison that it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401  (gives NumPy its bfloat16)
import numpy as np

GARBAGE_IDS = np.array([-1, -(2**31), 2**31 - 1, 1 << 30, -7], np.int32)
"""What surplus entries of block_table hold: each of them faults, or reads far away, if it is used."""

_PIECE = 1 << 22
"""Elements that are made at a time: float32 noise for a whole cache would take twice the cache's memory."""


def fill(
    rng: np.random.Generator, array: np.ndarray, half: float, advance: Callable[[int], object] = lambda elements: None
) -> np.ndarray:
    """Fill a contiguous array with numbers uniform in [-half, half), and return it.

    Args:
        rng: What they are drawn from.
        array: Of any floating dtype.
        half: The bound.
        advance: Called with the number of elements that were just written, for a progress bar.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        piece[:] = (rng.random(piece.size, dtype=np.float32) - np.float32(0.5)) * np.float32(2 * half)
        advance(piece.size)
    return array


def noise(rng: np.random.Generator, shape: Sequence[int], half: float, dtype: str | np.dtype) -> np.ndarray:
    """A new array of numbers uniform in [-half, half)."""
    return fill(rng, np.empty(shape, dtype), half)


def place(blocks: np.ndarray, context_lens: np.ndarray, block_size: int, surplus: np.ndarray) -> np.ndarray:
    """A block_table that names blocks in their order, sequence after sequence.

    Args:
        blocks: At least as many as the lengths need.
        context_lens: [batch], tokens.
        block_size: Tokens of a block.
        surplus: [batch, max_blocks], int32: what entries hold that no length needs.
    """
    is_needed = np.arange(surplus.shape[1]) < -(-context_lens[:, None] // block_size)
    table = surplus.copy()
    table[is_needed] = blocks[: is_needed.sum()]
    return table


def used_slots(table: np.ndarray, context_lens: np.ndarray, num_blocks: int, block_size: int) -> np.ndarray:
    """Which slots of a cache hold tokens that a block_table names: bool [num_blocks, block_size].

    Sequences may share a block that all of them fill.
    """
    tokens = np.arange(table.shape[1] * block_size).reshape(1, -1, block_size)
    is_needed = np.arange(table.shape[1]) < -(-context_lens[:, None] // block_size)
    is_used = np.zeros((num_blocks, block_size), bool)
    is_used[table[is_needed]] = (tokens < context_lens[:, None, None])[is_needed]
    return is_used
