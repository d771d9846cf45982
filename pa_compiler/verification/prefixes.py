"""The prefixes of drawn calls of attend_shared_prefix: which sequences share one, how long it is, and its blocks."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification.inputs import GARBAGE_IDS, seen_keys
from pa_compiler.verification.ragged import Queries


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """What attend_shared_prefix is told of prefixes.

    Attributes:
        prefix_table: [num_prefixes, max_prefix_blocks], int32; garbage where no query token sees anything.
        prefix_len: [num_prefixes], int32: tokens, whole blocks.
        prefix_start_loc: [num_prefixes + 1], int32: where the sequences of each prefix begin.
        block_table: [batch, max_blocks], int32: the draw's, with garbage in the place of prefixes.
    """

    prefix_table: np.ndarray
    prefix_len: np.ndarray
    prefix_start_loc: np.ndarray
    block_table: np.ndarray


@dataclasses.dataclass(frozen=True)
class Groups:
    """The sequences of each prefix, and its tokens: prefix_start_loc and prefix_len of Prefixes."""

    starts: np.ndarray
    lens: np.ndarray


def draw_groups(
    rng: np.random.Generator, spec: PagedAttentionSpec, context_lens: np.ndarray, queries: Queries, most: int
) -> tuple[np.ndarray, Groups]:
    """Neighbours that share what is before all of their query tokens, some of it or none; and longer lengths.

    A prefix is put before the tokens that sequences have: up to so many keys for all query tokens together.
    """
    batch, lens = len(context_lens), context_lens.copy()
    starts = np.concatenate([[0], np.sort(rng.integers(0, batch + 1, rng.integers(0, 3))), [batch]]).astype(np.int32)
    prefixes = np.zeros(len(starts) - 1, np.int32)
    for prefix, (begin, end) in enumerate(itertools.pairwise(starts)):
        members = begin + np.flatnonzero(queries.counts[begin:end])
        if not len(members):
            continue
        room = min(most // int(queries.counts[members].sum()), most // (len(members) * spec.block_size), 1 << 14)
        blocks = int(rng.choice(np.array([0, 1, 2, rng.integers(0, room // spec.block_size + 1)])))
        lens[members] += blocks * spec.block_size
        before = int((lens[members] - queries.counts[members]).min()) // spec.block_size
        prefixes[prefix] = spec.block_size * int(rng.choice(np.array([blocks, blocks, before])))
    return lens, Groups(starts, prefixes)


def share(
    rng: np.random.Generator,
    spec: PagedAttentionSpec,
    context_lens: np.ndarray,
    queries: Queries,
    groups: Groups,
    table: np.ndarray,
    is_needed: np.ndarray,
) -> Prefixes:
    """Let the sequences of each group share the blocks of its prefix; table then says so.

    Args:
        rng: What is drawn from.
        spec: The bounds of its mask are one interval.
        context_lens: [batch], int32.
        queries: Causal, without a tree.
        groups: Of draw_groups.
        table: [batch, max_blocks], int32: rows of sequences with query tokens get the blocks of their prefix.
        is_needed: Which of its entries name blocks, [batch, max_blocks] or fewer columns.
    """
    width = table.shape[1]
    given, rows = table.copy(), rng.choice(GARBAGE_IDS, (len(groups.lens), width + int(rng.integers(0, 3))))
    is_needed = np.pad(is_needed, ((0, 0), (0, width - is_needed.shape[1])))
    for prefix, (begin, end) in enumerate(itertools.pairwise(groups.starts)):
        members = begin + np.flatnonzero(queries.counts[begin:end])
        blocks = int(groups.lens[prefix]) // spec.block_size
        for at in _seen_blocks(spec, context_lens, queries, members, blocks):
            having = members[is_needed[members, at]]
            rows[prefix, at] = table[rng.choice(having), at] if len(having) else 0
        table[members, :blocks] = rows[prefix, :blocks]
        given[members, :blocks] = rng.choice(GARBAGE_IDS, (len(members), blocks))
    return Prefixes(rows, groups.lens, groups.starts, given)


def _seen_blocks(
    spec: PagedAttentionSpec, context_lens: np.ndarray, queries: Queries, members: np.ndarray, blocks: int
) -> range:
    """The blocks of a prefix from the first to the last of which a query token sees a key."""
    first, after = blocks, 0
    for sequence in members:
        length, count = int(context_lens[sequence]), int(queries.counts[sequence])
        ends = np.arange(length - count + 1, length + 1)
        ((begin, end),) = seen_keys(spec, ends, ends)
        begin, end = (np.broadcast_to(each, (count, 1)) for each in (begin, end))
        end = np.minimum(end, blocks * spec.block_size)
        if (some := begin < end).any():
            first = min(first, int(begin[some].min()) // spec.block_size)
            after = max(after, -(-int(end[some].max()) // spec.block_size))
    return range(first, after)
