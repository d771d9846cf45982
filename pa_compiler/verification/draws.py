"""Random calls of decode, attend and append_kv that a spec allows, with poison wherever a kernel has no business.

A draw is a pure function of the spec, a seed and a number: verify() names these in place of the arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pa_compiler.key_ranges import split_blocks
from pa_compiler.reference_functions import Places
from pa_compiler.score import BATCH
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import ragged
from pa_compiler.verification.codes import coded
from pa_compiler.verification.inputs import GARBAGE_IDS, function_inputs, needed_entries, used_slots
from pa_compiler.verification.numbers import ends, huge_scores, ordinary
from pa_compiler.verification.prefixes import Groups, Prefixes, draw_groups, share
from pa_compiler.verification.ragged import Queries, draw_queries, poison_the_last

_ELEMENTS = 1 << 20
"""Multiplications of a query with keys in an ordinary draw: it takes some milliseconds."""
_LONG_DRAW = 8
"""One draw in so many has this many times the tokens."""
_SEVERAL = 32
"""Draws of attend have so many times the multiplications: a query token needs keys."""
_MAX_SLOTS, _MAX_BATCH = 1 << 15, 64
_EDGES = (16, 128, 256)
"""Multiples of these, of the block's size and of the length of a range are where vectors, tiles and ranges end."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call: its arrays, with the caches in NHD whatever the spec's layout, and how it is made.

    Attributes:
        query: [batch or query tokens, num_heads, head_dim], dtype, with poison between its rows.
        keys: [num_blocks, block_size, num_kv_heads, head_dim], dtype; poison where no token is that is seen.
        values: [num_blocks, block_size, num_kv_heads, result_dim], the same; with shared_kv a view of keys.
        block_table: [batch, max_blocks], int32; garbage past the entries that a length needs, and before the window.
        context_lens: [batch], int32.
        queries: What attend is told of the query tokens; None for a call of decode.
        prefixes: What attend_shared_prefix is told besides; None for a call of decode or attend.
        is_used: [num_blocks, block_size], bool: the slots that hold a token that is seen.
        poison: What the other slots hold: NaN or an infinity.
        scale: Factor of the scores, or None.
        heads: alibi_slopes and sinks, float32 [num_heads], scales of codes, and the dict of inputs: those of these
            keywords of decode that the spec has.
        new: What append_kv is given for keys and values; None where it is these.
        append: Whether append_kv writes the tokens into the caches.
        one_buffer: Whether both caches lie in one buffer, block beside block.
        give_out: Whether out is given, as a view into a larger array.
        lse: "none", "returned" or "given", also as a view into a larger array.
        num_threads: Threads of the call.
        as_pair: Whether the call takes block_table as a pair of indptr and indices.
        rng: For what remains to be drawn: orders and places.
    """

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    block_table: np.ndarray
    context_lens: np.ndarray
    queries: Queries | None
    prefixes: Prefixes | None
    is_used: np.ndarray
    poison: float
    scale: float | None
    heads: dict[str, Any]
    append: bool
    one_buffer: bool
    give_out: bool
    lse: str
    num_threads: int
    as_pair: bool
    rng: np.random.Generator
    new: tuple[np.ndarray, np.ndarray] | None = None


def draw(
    spec: PagedAttentionSpec,
    seed: int,
    number: int,
    attends: bool = False,
    shares: bool = False,
    most_query_tokens: int | None = None,
) -> Draw:
    """The draw of a number from a seed, both 0 or more: a call of decode; with attends, every second one of attend.

    With shares, those of attend that are causal and have no tree are of attend_shared_prefix. most_query_tokens is
    Module's.
    """
    rng = np.random.default_rng((seed, number))
    elements = _ELEMENTS * (_LONG_DRAW if number % _LONG_DRAW >= _LONG_DRAW - 1 - attends else 1)
    context_lens = _context_lens(rng, spec, elements)
    if spec.inputs or spec.constants:
        context_lens = _within_arrays(rng, spec, context_lens)
    queries, groups, rows = None, None, len(context_lens)
    if attends and number % 2:
        products = _SEVERAL * elements // (spec.num_heads * spec.head_dim)
        context_lens, queries = draw_queries(rng, spec, context_lens, products, most_query_tokens)
        if shares and queries.causal and queries.tree_mask is None:
            context_lens, groups = draw_groups(rng, spec, context_lens, queries, products)
        rows = int(queries.query_start_loc[-1])
    inputs = {"inputs": function_inputs(rng, spec, len(context_lens))} if spec.inputs else {}
    block_table, is_used, prefixes = _place(rng, spec, context_lens, queries, inputs.get("inputs", {}), groups)
    # A function has a bound on the error of its results where scores and what it makes of them are ordinary numbers.
    # Scales of codes leave no scores that are exact.
    kinds = (ordinary, ordinary if spec.has_scales else huge_scores, ends) if spec.score_mod is None else (ordinary,)
    kind = kinds[rng.choice(len(kinds), p=[0.5, 0.25, 0.25] if len(kinds) > 1 else None)]
    query, keys, values, scale = kind(rng, spec, rows, len(is_used))
    values = keys[..., : spec.result_dim] if spec.shared_kv else values
    poison = float(rng.choice([np.nan, np.nan, np.inf, -np.inf]))
    keys[~is_used] = values[~is_used] = poison
    if queries is not None and kind is ordinary and _weighs_all(spec) and rng.random() < 0.25:
        poison_the_last(values, is_used, block_table, context_lens, spec.block_size)
    scales, new = {}, None
    if spec.has_scales:
        codes = coded(rng, spec, keys, values, is_used)
        keys, values, new = codes.keys, codes.values, (codes.new_keys, codes.new_values)
        scales = {name: _scales_inside(scale, rng) for name, scale in codes.scales.items()}
    return Draw(
        query=inside(query, poison, rng)[0],
        keys=keys,
        values=values,
        block_table=inside(block_table, -(2**31), rng)[0],
        context_lens=context_lens,
        queries=queries,
        prefixes=prefixes,
        is_used=is_used,
        poison=poison,
        scale=scale,
        heads=_heads(rng, spec, scale if kind is huge_scores else None) | scales | inputs,
        append=bool(rng.random() < 0.5),
        one_buffer=bool(rng.random() < 0.5),
        give_out=bool(rng.random() < 0.5),
        lse=str(rng.choice(["none", "returned", "given"])),
        num_threads=int(rng.choice([1, 2, 3, 8])),
        as_pair=bool(rng.random() < 0.25),
        rng=rng,
        new=new,
    )


def _weighs_all(spec: PagedAttentionSpec) -> bool:
    """Whether all keys have weights that float32 holds in ordinary draws: one of 0 stays 0 beside a scale of NaN."""
    return spec.score_mod is None and not (spec.token_scales and spec.alibi)


def inside(array: np.ndarray, filler: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A copy of an array as a view into a larger one that is otherwise filler, and the larger one.

    The view begins at any element, and its rows have any distance; the last axis stays contiguous.
    """
    low, high = rng.integers(0, 4, (2, array.ndim))
    whole = np.full(low + array.shape + high, filler, array.dtype)
    view = whole[tuple(slice(start, start + extent) for start, extent in zip(low, array.shape, strict=True))]
    view[...] = array
    return view, whole


def _scales_inside(scale: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """inside; of scales with zero points the slots of a block stay side by side."""
    if scale.ndim < 4:
        return inside(scale, np.nan, rng)[0]
    return inside(scale.reshape(*scale.shape[:2], 2 * scale.shape[2]), np.nan, rng)[0].reshape(scale.shape)


def _context_lens(rng: np.random.Generator, spec: PagedAttentionSpec, elements: int) -> np.ndarray:
    """Lengths of 0 and 1, around the ends of blocks, tiles and ranges, and long ones, in room for elements."""
    block, chunk = spec.block_size, spec.batch_chunk
    slots = max(min(elements // (spec.num_heads * spec.head_dim), _MAX_SLOTS), 4 * block)
    batch = min(int(rng.choice([0, 1, 2, 3, chunk - 1, chunk, chunk + 1, 2 * chunk + 1, 9])), _MAX_BATCH)
    lens = np.zeros(batch, np.int32)
    for sequence in range(batch):
        window = () if spec.window is None else (min(spec.window, _MAX_SLOTS),) * 2
        edge = int(rng.choice([block, *_EDGES, split_blocks(spec) * block, *window])) * int(rng.integers(1, 4))
        lens[sequence] = min(
            int(
                rng.choice(
                    [0, 1, edge - 1, edge, edge + 1, rng.integers(0, 3 * block + 1), slots ** rng.random()],
                    p=[0.1, 0.1, 0.1, 0.15, 0.15, 0.2, 0.2],
                )
            ),
            slots // block * block,
        )
        slots -= -(-int(lens[sequence]) // block) * block
    return rng.permutation(lens)


def _place(
    rng: np.random.Generator,
    spec: PagedAttentionSpec,
    context_lens: np.ndarray,
    queries: Queries | None,
    inputs: dict[str, np.ndarray],
    groups: Groups | None,
) -> tuple[np.ndarray, np.ndarray, Prefixes | None]:
    """block_table, with its blocks anywhere in a cache that has more, the slots that are seen, and prefixes."""
    needed = -(-context_lens // spec.block_size)
    width = int(needed.max(initial=0))
    if queries is None:
        is_needed = needed_entries(spec, context_lens, width)
    else:
        is_needed = ragged.needed_entries(spec, context_lens, queries, width)
    num_blocks = int(is_needed.sum()) + int(rng.integers(1, 4))
    table = rng.choice(GARBAGE_IDS, (len(needed), width + int(rng.integers(0, 3))))
    table[:, :width][is_needed] = rng.permutation(num_blocks)[: is_needed.sum()]
    sees_all = (spec.mask_mod is None) & (context_lens <= (spec.window or context_lens))
    whole = np.flatnonzero((context_lens >= spec.block_size) & sees_all & is_needed.any(axis=1))
    if len(whole) > 1 and rng.random() < 0.25:  # sequences that begin alike share their first block
        first, second = rng.choice(whole, 2, replace=False)
        table[second, 0] = table[first, 0]
    if queries is not None:
        shared = None if groups is None else share(rng, spec, context_lens, queries, groups, table, is_needed)
        return table, ragged.used_slots(spec, table, context_lens, queries, num_blocks, inputs), shared
    is_used = used_slots(spec, table, context_lens, num_blocks)
    if spec.mask_mod is not None:
        is_used &= _unmasked(spec, context_lens, table, is_used.shape, inputs)
    return table, is_used, None


def _within_arrays(rng: np.random.Generator, spec: PagedAttentionSpec, context_lens: np.ndarray) -> np.ndarray:
    """In three of four draws lengths up to the largest extent of the arrays: positions may be indices of them."""
    extents = [extent for each in (*spec.inputs, *spec.constants) for extent in each.shape if extent != BATCH]
    return np.minimum(context_lens, max(extents, default=1)) if rng.random() < 0.75 else context_lens


def _unmasked(
    spec: PagedAttentionSpec,
    context_lens: np.ndarray,
    table: np.ndarray,
    shape: tuple[int, ...],
    inputs: dict[str, np.ndarray],
) -> np.ndarray:
    """The slots of a cache with a token that mask_mod leaves for a head of a sequence that has it."""
    found = np.zeros(shape, bool)
    for sequence, length in enumerate(context_lens.tolist()):
        position = np.arange(max(0, length - (spec.window or length)), length)
        if not length:
            continue
        places = Places(sequence, length - 1, position, inputs)
        seen, _ = places.mask(spec.mask_mod, (1, spec.num_heads, len(position)))
        position = position[seen.any(axis=(0, 1))]
        found[table[sequence, position // spec.block_size], position % spec.block_size] = True
    return found


def _heads(rng: np.random.Generator, spec: PagedAttentionSpec, huge: float | None) -> dict[str, np.ndarray]:
    """alibi_slopes and sinks, as far as the spec has them, as views; huge is the scale of scores that are exact.

    To these a slope adds what is as exact, a part of the scale. Other slopes are ALiBi's times powers of two, of either
    sign. Sinks lie among the scores, far above them or far below, or there is none: -inf.
    """
    heads, count = {}, spec.num_heads
    if spec.alibi:
        slopes = 2.0 ** (-8 / count * np.arange(1, count + 1) + rng.integers(-4, 3))
        if huge is not None and spec.softcap is None:
            slopes = huge * 2.0 ** -rng.integers(0, 7, count)
        heads["alibi_slopes"] = slopes * rng.choice([1, 1, -1, 0], count)
    if spec.sinks:
        among = rng.standard_normal(count) * rng.choice([1, 20, 1 if huge is None else 8 * huge])
        far = rng.choice([0, 1e4, -1e4, 1e30, -1e30, -np.inf], count)
        heads["sinks"] = np.where(rng.random(count) < 0.6, among, far)
    return {name: inside(array.astype(np.float32), np.nan, rng)[0] for name, array in heads.items()}
