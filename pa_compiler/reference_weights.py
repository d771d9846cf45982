"""What the tokens of a sequence weigh for a query token, in NumPy and float64: the softmax of the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pa_compiler import reference_functions
from pa_compiler.score import Function

Functions = Function | Callable[..., Any]


class Seen(NamedTuple):
    """Where a query token is in its sequence, and the positions of the keys that it may see, ascending."""

    query_pos: int
    position: np.ndarray


def tokens_of(
    context_lens: np.ndarray,
    query_start_loc: np.ndarray,
    *,
    causal: bool = True,
    tree_mask: np.ndarray | None = None,
) -> Iterator[tuple[int, int, Seen]]:
    """Each query token of a ragged call, as attend has them: its sequence, its number, and what it may see."""
    tree_end = 0
    for sequence, context_len in enumerate(np.asarray(context_lens).tolist()):
        begin, end = int(query_start_loc[sequence]), int(query_start_loc[sequence + 1])
        count = end - begin
        tree_start, tree_end = tree_end, tree_end + count * count
        position = np.arange(context_len)
        for i in range(count):
            query_pos = context_len - count + i
            sees = position <= query_pos if causal else position >= 0
            if tree_mask is not None:
                row = np.asarray(tree_mask[tree_start:tree_end]).reshape(count, count)[i]
                sees = np.concatenate([position[: context_len - count] >= 0, row.astype(bool)])
            yield sequence, begin + i, Seen(query_pos, position[sees])


class Weighed(NamedTuple):
    """The tokens that one query token may see, with what each weighs for each head; in float64.

    Attributes:
        scores: [num_kv_heads, group, tokens], as the softmax takes them.
        weights: The same shape: shares of a denominator that has the sink in it.
        values: [num_kv_heads, tokens, value_dim]; 0 where a mask hides the token from all heads that share it.
        lse: [num_heads], the logarithm of the denominator.
        given: As scores: what score_mod was given.
        magnitude: As scores: sum(abs(query) * abs(key)) with the scale, of the products that a score is summed of; 0
            without score_mod.
        added: As values: the magnitudes of what is added up to be an element, where values are rotated or have zero
            points; else those of the values.
        visible: bool, as scores: what mask_mod leaves. None without one.
        position: [tokens], of the keys.
    """

    scores: np.ndarray
    weights: np.ndarray
    values: np.ndarray
    lse: np.ndarray
    given: np.ndarray
    magnitude: np.ndarray
    added: np.ndarray
    visible: np.ndarray | None
    position: np.ndarray

    def out(self) -> np.ndarray:
        """[num_heads, value_dim]: the averages of the values. What a head does not see has no part in its own."""
        if self.visible is None or np.isfinite(self.values).all():
            return (self.weights @ self.values).reshape(len(self.lse), -1)
        group = self.weights.shape[1]
        return np.stack(
            [
                self.weights[head // group, head % group][seen] @ self.values[head // group][seen]
                for head, seen in enumerate(self.visible.reshape(len(self.lse), -1))
            ]
        )


def weigh(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    blocks: np.ndarray,
    seen: Seen,
    scale: float | np.ndarray | None = None,
    *,
    kv_layout: str = "NHD",
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    key_scale: np.ndarray | None = None,
    value_scale: np.ndarray | None = None,
    kv_rotation: str | None = None,
    score_mod: Functions | None = None,
    mask_mod: Functions | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    batch: int = 0,
) -> Weighed:
    """What the tokens of one sequence weigh for one of its query tokens.

    Args:
        query: [num_heads, head_dim].
        key_cache: This, value_cache and what follows scale are those of decode.
        value_cache: As key_cache.
        blocks: A row of block_table.
        seen: Where the query token is, and the keys that it may see, before the window and mask_mod.
        scale: Factor on every score; 1 / sqrt(head_dim) where it is None.
        kv_layout: As for decode.
        window: As for decode.
        softcap: As for decode.
        alibi_slopes: As for decode.
        sinks: As for decode.
        key_scale: As for decode.
        value_scale: As for decode.
        kv_rotation: As for decode.
        score_mod: As for decode.
        mask_mod: As for decode.
        inputs: As for decode.
        batch: The number of the sequence, for functions.
    """
    num_heads, head_dim = query.shape
    position = seen.position if window is None else seen.position[seen.position > seen.query_pos - window]
    places = reference_functions.Places(batch, seen.query_pos, position, inputs or {})
    num_kv_heads = key_cache.shape[2 if kv_layout == "NHD" else 1]
    visible = is_nan = None
    if mask_mod is not None:
        visible, is_nan = places.mask(mask_mod, (num_kv_heads, num_heads // num_kv_heads, len(position)))
        is_read = visible.any(axis=(0, 1))
        position, visible, is_nan = position[is_read], visible[..., is_read], is_nan[..., is_read]
        places = places._replace(key_pos=position)
    key, values = gathered(key_cache, value_cache, blocks, position, kv_layout)
    block_size = extents(value_cache, kv_layout)[0]
    key, of_key = numbers_of(key.swapaxes(1, 2), key_scale, blocks, position, block_size, kv_rotation)
    key, of_key = key.swapaxes(1, 2), of_key.swapaxes(1, 2)
    values, added = numbers_of(values, value_scale, blocks, position, block_size, kv_rotation)
    by_kv_head = (num_kv_heads, num_heads // num_kv_heads, 1)
    grouped = query.astype(np.float64).reshape(num_kv_heads, -1, head_dim)
    if visible is not None:
        key.swapaxes(1, 2)[~visible.any(axis=1)] = 0
        values[~visible.any(axis=1)] = added[~visible.any(axis=1)] = 0
    factor = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    with np.errstate(invalid="ignore"):  # a key of infinities may be hidden from some heads
        scores = factor * (grouped @ key)
        magnitude = np.zeros(()) if score_mod is None else abs(factor) * (np.abs(grouped) @ of_key)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    given = scores
    if score_mod is not None:
        scores = places.score(score_mod, scores, visible)
    if alibi_slopes is not None:
        scores = scores + np.asarray(alibi_slopes, np.float64).reshape(by_kv_head) * (position - seen.query_pos)
    if visible is not None and is_nan is not None:
        scores = np.where(visible, np.where(is_nan, np.nan, scores), -np.inf)
    sink = np.full(by_kv_head, -np.inf) if sinks is None else np.asarray(sinks, np.float64).reshape(by_kv_head)
    peak = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    has_weight = peak != -np.inf
    weights = np.exp(scores - np.where(has_weight, peak, 0))
    row_sum = weights.sum(axis=-1, keepdims=True) + np.exp(sink - np.where(has_weight, peak, 0))
    row_sum = np.where(has_weight, row_sum, 1)
    lse = (peak + np.log(row_sum)).reshape(num_heads)
    return Weighed(scores, weights / row_sum, values, lse, given, magnitude, added, visible, position)


def extents(value_cache: np.ndarray, kv_layout: str) -> tuple[int, int]:
    """block_size and value_dim of a cache."""
    slots, dim = value_cache.shape[1 if kv_layout == "NHD" else 2], value_cache.shape[3]
    if value_cache.dtype == np.uint8:
        dim *= 2
    if kv_layout == "packed" and value_cache.dtype.name in ("bfloat16", "uint8"):
        slots, dim = 2 * slots, dim // 2
    return slots, dim


def numbers_of(
    codes: np.ndarray,
    scale: np.ndarray | None,
    blocks: np.ndarray,
    position: np.ndarray,
    block_size: int,
    kv_rotation: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """What elements of a cache [num_kv_heads, tokens, dim] count, and the magnitudes that are added up for each."""
    if scale is None:
        return codes, np.abs(codes)
    of_tokens = scales_of(scale, blocks, position, len(codes), block_size)
    with np.errstate(invalid="ignore"):  # NaN and infinite codes, and scales
        if np.ndim(scale) == 4:
            # the code in the middle is as near to 0 as any is for certain
            middle = of_tokens[..., 1:] + 8 * of_tokens[..., :1]
            numbers = of_tokens[..., :1] * codes + of_tokens[..., 1:]
            added = np.abs(of_tokens[..., :1] * (codes - 8)) + np.abs(middle)
        else:
            numbers = of_tokens[..., None] * codes
            added = np.abs(numbers)
        if kv_rotation not in (None, "none"):
            numbers = rotated(numbers)
            # errors of either sign, of elements that are added up with either, are as large as they were on average
            added = np.maximum(np.abs(numbers), np.sqrt((added**2).mean(axis=-1, keepdims=True)))
    return numbers, added


def rotated(numbers: np.ndarray) -> np.ndarray:
    """The last axis times H / sqrt(dim), in float64."""
    return numbers.astype(np.float64) @ _sylvester(numbers.shape[-1])


@functools.cache
def _sylvester(dim: int) -> np.ndarray:
    """H / sqrt(dim): an element is negative where its row and its column have an odd number of ones in common."""
    places = np.arange(dim)
    common = places[:, None] & places
    ones = sum((common >> place) & 1 for place in range(dim.bit_length()))
    return (1 - 2 * (ones % 2)) / np.sqrt(dim)


def scales_of(
    scale: np.ndarray, blocks: np.ndarray, position: np.ndarray, num_kv_heads: int, block_size: int
) -> np.ndarray:
    """What each code of some tokens counts, float64 [num_kv_heads, tokens]: of a cache, of a head, or of each token.

    With zero points [num_kv_heads, tokens, 2].
    """
    scale = np.asarray(scale, np.float64)
    if scale.ndim >= 3:
        return scale[blocks[position // block_size], :, position % block_size].swapaxes(0, 1)
    return np.broadcast_to(np.broadcast_to(scale, num_kv_heads)[:, None], (num_kv_heads, len(position)))


def gathered(
    key_cache: np.ndarray, value_cache: np.ndarray, blocks: np.ndarray, position: np.ndarray, kv_layout: str
) -> tuple[np.ndarray, np.ndarray]:
    """Keys [num_kv_heads, head_dim, tokens] and values [num_kv_heads, tokens, value_dim] of some tokens, in float64."""
    block_size, out_dim = extents(value_cache, kv_layout)
    if kv_layout == "packed":  # gathered element by element: [tokens, dim, num_kv_heads]
        pair = 2 if key_cache.dtype.name in ("bfloat16", "uint8") else 1
        block, slot = blocks[position // block_size][:, None], (position % block_size)[:, None]
        dim, out = np.arange(pair * key_cache.shape[2]), np.arange(out_dim)
        keys = _element(key_cache, block, dim // pair, pair * slot + dim % pair).swapaxes(1, 2)
        values = _element(value_cache, block, slot // pair, pair * out + slot % pair).swapaxes(1, 2)
    else:
        if kv_layout == "HND":
            key_cache, value_cache = key_cache.swapaxes(1, 2), value_cache.swapaxes(1, 2)
        block, slot = blocks[position // block_size], position % block_size
        keys, values = (_whole_rows(cache[block, slot]) for cache in (key_cache, value_cache))
    # in C's order whatever the layout, since BLAS may sum in an order that depends on the strides
    return (
        keys.astype(np.float64, order="C").transpose(1, 2, 0),
        values.astype(np.float64, order="C").transpose(1, 0, 2),
    )


def _element(cache: np.ndarray, block: np.ndarray, row: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Elements of a packed cache, whose place in the last axis is last: of a byte with two, half of it."""
    if cache.dtype != np.uint8:
        return np.asarray(cache[block, :, row, last])
    return np.asarray(cache[block, :, row, last // 2] >> (4 * (last % 2))[..., None] & 15)


def _whole_rows(rows: np.ndarray) -> np.ndarray:
    """Rows whose last axis has elements: of bytes with two, both."""
    if rows.dtype != np.uint8:
        return rows
    return np.stack([rows & 15, rows >> 4], axis=-1).reshape(*rows.shape[:-1], 2 * rows.shape[-1])
