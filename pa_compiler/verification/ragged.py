"""The query tokens of drawn calls of attend: how many there are, which keys they see, and what must not be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from pa_compiler.key_ranges import attend_range_blocks
from pa_compiler.reference_functions import Places
from pa_compiler.reference_weights import Seen, tokens_of
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification.inputs import needed_entries as needed_by_decode
from pa_compiler.verification.inputs import seen_keys

_COUNTS = (0, 1, 2, 3, 7, 16, 17, 33, 512)
"""Query tokens of a sequence: none, those of decode, of guesses, and around the ends of row tiles and of work items."""


@dataclasses.dataclass(frozen=True)
class Queries:
    """Which tokens of a call's sequences are query tokens, the last ones, and what else attend is told of them.

    Attributes:
        query_start_loc: [batch + 1], int32.
        causal: Whether a query token sees nothing after itself.
        tree_mask: [sum of n * n], bool or uint8, or None.
    """

    query_start_loc: np.ndarray
    causal: bool
    tree_mask: np.ndarray | None

    @property
    def counts(self) -> np.ndarray:
        """[batch]: the query tokens of each sequence."""
        return np.diff(self.query_start_loc)

    def seen(self, spec: PagedAttentionSpec, context_lens: np.ndarray) -> Iterator[tuple[int, Seen]]:
        """Each query token's sequence, and what it sees within the window."""
        starts, tree_mask = self.query_start_loc, self.tree_mask
        for sequence, _, (query_pos, at) in tokens_of(context_lens, starts, causal=self.causal, tree_mask=tree_mask):
            yield sequence, Seen(query_pos, at if spec.window is None else at[at > query_pos - spec.window])


def draw_queries(
    rng: np.random.Generator, spec: PagedAttentionSpec, context_lens: np.ndarray, products: int, most: int | None
) -> tuple[np.ndarray, Queries]:
    """Lengths, some of which end with a range of keys, and query tokens that see up to so many keys, all together.

    A sequence has up to `most` of them, if that is a number.
    """
    lens, counts = context_lens.copy(), np.zeros(len(context_lens), np.int64)
    edge = attend_range_blocks(spec) * spec.block_size * int(rng.integers(1, 3))
    if len(lens) and edge < min(products, 1 << 15) and rng.random() < 0.5:
        lens[rng.integers(len(lens))] = edge + rng.integers(-1, 3)
    for sequence, length in enumerate(lens.tolist()):
        count = min(int(rng.choice([*_COUNTS, length])), length, length if most is None else most)
        counts[sequence] = count if count * length <= products else min(2, length)
        products -= int(counts[sequence]) * length
        if products < 0:
            lens[sequence] = counts[sequence] = 0
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    causal = bool(rng.random() < 0.75)
    tree = _tree(rng, counts) if causal and rng.random() < 0.4 else None
    return lens, Queries(starts, causal, tree)


def _tree(rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
    """For each sequence a matrix of which of its query tokens each sees: those before it on its path, or any at all."""
    masks = [np.zeros((0, 0), bool)]
    for count in counts.tolist():
        mask = rng.random((count, count)) < 0.5
        if rng.random() < 0.7:
            mask = np.eye(count, dtype=bool)
            for i in range(1, count):
                mask[i] |= mask[rng.integers(i)]
        masks.append(mask)
    flat = np.concatenate([mask.reshape(-1) for mask in masks])
    return flat if rng.random() < 0.5 else flat * rng.integers(1, 256, flat.shape).astype(np.uint8)


def needed_entries(spec: PagedAttentionSpec, context_lens: np.ndarray, queries: Queries, max_blocks: int) -> np.ndarray:
    """Which entries of a block_table have to name blocks: bool [batch, max_blocks].

    Of several query tokens, for each of the spec's bounds, those from the first to the last block that one of them may
    see.
    """
    is_needed = needed_by_decode(spec, context_lens, max_blocks)
    block, tree_end = np.arange(max_blocks), 0
    for sequence, (length, count) in enumerate(zip(context_lens.tolist(), queries.counts.tolist(), strict=True)):
        hides_itself = queries.tree_mask is not None and count == 1 and not queries.tree_mask[tree_end]
        tree_end += count * count
        if count == 1 and not hides_itself:
            continue
        is_needed[sequence] = False
        query_ends = np.arange(length - count + 1, length + 1)
        sees_ahead = not queries.causal or queries.tree_mask is not None
        for ends in seen_keys(spec, np.full(count, length) if sees_ahead else query_ends, query_ends):
            begins, after = (np.broadcast_to(each, (count, 1)) for each in ends)
            some = begins < after
            if some.any():
                begin, end = begins[some].min(), after[some].max()
                is_needed[sequence] |= (block * spec.block_size < end) & ((block + 1) * spec.block_size > begin)
    return is_needed


def used_slots(
    spec: PagedAttentionSpec,
    table: np.ndarray,
    context_lens: np.ndarray,
    queries: Queries,
    num_blocks: int,
    inputs: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Which slots of a cache hold tokens that some query token sees with some head: bool [num_blocks, block_size]."""
    is_used = np.zeros((num_blocks, spec.block_size), bool)
    for sequence, (query_pos, position) in queries.seen(spec, context_lens):
        if spec.mask_mod is not None:
            seen, _ = Places(sequence, query_pos, position, inputs).mask(
                spec.mask_mod, (1, spec.num_heads, len(position))
            )
            position = position[seen.any(axis=(0, 1))]
        is_used[table[sequence, position // spec.block_size], position % spec.block_size] = True
    return is_used


def poison_the_last(
    values: np.ndarray, is_used: np.ndarray, table: np.ndarray, context_lens: np.ndarray, block_size: int
) -> None:
    """NaN in the value of each sequence's last token, if some query token sees it: the others have nothing of it."""
    for blocks, length in zip(table, context_lens.tolist(), strict=True):
        block, slot = blocks[(length - 1) // block_size] if length else -1, (length - 1) % block_size
        if 0 <= block < len(values) and is_used[block, slot]:
            values[block, slot] = np.nan
