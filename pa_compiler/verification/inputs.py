"""What the inputs of calls are made of: noise in a cache, and blocks anywhere in it.

Cases, draws, tests and benchmarks make theirs of these, each with the lengths, numbers and poison that it is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy its bfloat16)
import numpy as np

from pa_compiler.bounds import affine, bounds
from pa_compiler.score import BATCH
from pa_compiler.spec import PagedAttentionSpec

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


def seen_keys(
    spec: PagedAttentionSpec, context_lens: np.ndarray, query_ends: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Between which positions keys may be seen: for each of the spec's bounds the first and the end, [batch, 1].

    Args:
        spec: With the window and the mask_mod.
        context_lens: [batch], of which the query token is the last; or up to where it may see keys.
        query_ends: [batch], one more than the position of the query token, where that may be another one.
    """
    lengths = context_lens[:, None].astype(np.int64)
    ends = None if query_ends is None else query_ends[:, None].astype(np.int64)
    operations = affine.Operations(minimum=np.minimum, maximum=np.maximum)
    intervals = bounds(spec, query_ends is not None).intervals
    found = [[affine.value(end, lengths, operations, ends) for end in interval] for interval in intervals]
    return [(np.maximum(begin, 0), np.minimum(end, lengths)) for begin, end in found]


def needed_entries(spec: PagedAttentionSpec, context_lens: np.ndarray, max_blocks: int) -> np.ndarray:
    """Which entries of a block_table name blocks with tokens that may be seen: bool [batch, max_blocks]."""
    starts = np.arange(max_blocks) * spec.block_size
    is_needed = np.zeros((len(context_lens), max_blocks), bool)
    for begin, end in seen_keys(spec, context_lens):
        is_needed |= np.maximum(begin, starts) < np.minimum(end, starts + spec.block_size)
    return is_needed


def place(spec: PagedAttentionSpec, blocks: np.ndarray, context_lens: np.ndarray, surplus: np.ndarray) -> np.ndarray:
    """A block_table that names blocks in their order, sequence after sequence.

    Args:
        spec: With the block_size, and with what says which keys are seen.
        blocks: At least as many as the lengths need.
        context_lens: [batch], tokens.
        surplus: [batch, max_blocks], int32: what entries hold that are not needed.
    """
    is_needed = needed_entries(spec, context_lens, surplus.shape[1])
    table = surplus.copy()
    table[is_needed] = blocks[: is_needed.sum()]
    return table


def used_slots(spec: PagedAttentionSpec, table: np.ndarray, context_lens: np.ndarray, num_blocks: int) -> np.ndarray:
    """Which slots of a cache hold tokens that a block_table names and that may be seen: bool [num_blocks, block_size].

    Sequences may share a block of which all of them see all slots.
    """
    tokens = np.arange(table.shape[1] * spec.block_size)
    is_seen = np.zeros((len(table), len(tokens)), bool)
    for begin, end in seen_keys(spec, context_lens):
        is_seen |= (tokens >= begin) & (tokens < end)
    is_needed = needed_entries(spec, context_lens, table.shape[1])
    is_used = np.zeros((num_blocks, spec.block_size), bool)
    is_used[table[is_needed]] = is_seen.reshape(*table.shape, spec.block_size)[is_needed]
    return is_used


def head_arrays(rng: np.random.Generator, spec: PagedAttentionSpec, batch: int) -> dict[str, Any]:
    """What decode takes for a spec's score functions, by keyword: float32 arrays [num_heads], and a dict of inputs.

    Slopes are those of ALiBi's paper, 2**(-8 i / num_heads) from i = 1 on, and sinks are standard normal.
    """
    arrays: dict[str, Any] = {}
    if spec.alibi:
        arrays["alibi_slopes"] = (2.0 ** (-8 / spec.num_heads * np.arange(1, spec.num_heads + 1))).astype(np.float32)
    if spec.sinks:
        arrays["sinks"] = rng.standard_normal(spec.num_heads, np.float32)
    if spec.inputs:
        arrays["inputs"] = function_inputs(rng, spec, batch)
    return arrays


def function_inputs(rng: np.random.Generator, spec: PagedAttentionSpec, batch: int) -> dict[str, np.ndarray]:
    """Arrays for the inputs of a spec's functions. Each is contiguous, and begins anywhere in a larger one.

    Floating numbers are standard normal, and a bool is as often True as False. Whole numbers may be indices, so they
    are from 0 to 3, and below the least extent of all arrays.
    """
    fixed = [extent for each in (*spec.inputs, *spec.constants) for extent in each.shape if extent != BATCH]
    arrays = {}
    for name, dtype, declared in spec.inputs:
        shape = tuple(batch if extent == BATCH else extent for extent in declared)
        count, before = math.prod(shape), int(rng.integers(0, 4))
        numbers: np.ndarray
        if dtype == "bool":
            numbers = rng.random(before + count) < 0.5
        elif dtype == "int32":
            numbers = rng.integers(0, min([4, *fixed]), before + count)
        else:
            numbers = rng.standard_normal(before + count)
        arrays[name] = numbers.astype(dtype)[before:].reshape(shape)
    return arrays


def constant_arrays(spec: PagedAttentionSpec) -> dict[str, np.ndarray]:
    """The tensors that the functions of a spec close over, by their names in its terms."""
    return {each.name: np.frombuffer(each.data, each.dtype).reshape(each.shape) for each in spec.constants}
