"""Paged attention in NumPy, in float64: what every kernel is measured against.

It gathers, multiplies and takes a plain softmax over the whole sequence: no tiles, no online rescaling, nothing shared
with the kernels, so that a mistake in one cannot hide in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pa_compiler import reference_functions
from pa_compiler.score import Function

Functions = Function | Callable[..., Any]


class Weighed(NamedTuple):
    """The visible tokens of one sequence, with what each weighs for each head; in float64.

    Attributes:
        scores: [num_kv_heads, group, tokens], as the softmax takes them.
        weights: The same shape: shares of a denominator that has the sink in it.
        values: [num_kv_heads, tokens, value_dim]; 0 where a mask hides the token from all heads that share it.
        lse: [num_heads], the logarithm of the denominator.
        given: As scores: what score_mod was given.
        magnitude: As scores: sum(abs(query) * abs(key)) with the scale, of the products that a score is summed of; 0
            without score_mod.
        visible: bool, as scores: what mask_mod leaves. None without one.
    """

    scores: np.ndarray
    weights: np.ndarray
    values: np.ndarray
    lse: np.ndarray
    given: np.ndarray
    magnitude: np.ndarray
    visible: np.ndarray | None

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


def decode(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    block_table: np.ndarray,
    context_lens: np.ndarray,
    scale: float | np.ndarray | None = None,
    *,
    kv_layout: str = "NHD",
    return_lse: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    score_mod: Functions | None = None,
    mask_mod: Functions | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attend from one query token per sequence to the first context_len tokens of that sequence.

    For each query head h, with kv head g = h // (num_heads // num_kv_heads) and tokens t < context_len:
    out[h] = sum_t softmax_t(scale * query[h] . key[t, g]) * value[t, g].

    The query stands at position context_len - 1. A score is scaled, then capped, then what score_mod makes of it, then
    biased by position, then masked. A key that is masked has no part in anything, whatever it is.
    A score of -inf has a weight of 0, and a head that has no other score is as in an empty sequence: out 0, and lse
    -inf, or the sink.

    One sequence is in float64 at a time, and only slots that are seen are read: a cache of any size, with anything in
    its other slots, and a block table with anything in its other entries, will do. Block ids are trusted.

    Args:
        query: [batch, num_heads, head_dim], any floating dtype.
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], or for "HND"
            [num_blocks, num_kv_heads, block_size, head_dim], any floating dtype. For "packed"
            [num_blocks, num_kv_heads, head_dim, block_size]; if the dtype is bfloat16
            [num_blocks, num_kv_heads, head_dim / 2, 2 * block_size], pairs along head_dim.
        value_cache: The same shape as key_cache, but for value_dim in the place of head_dim; for "packed"
            [num_blocks, num_kv_heads, block_size, value_dim], and if the dtype is bfloat16
            [num_blocks, num_kv_heads, block_size / 2, 2 * value_dim], pairs along tokens. Where values are the first
            elements of keys, a view of those: key_cache[..., :value_dim].
        block_table: [batch, max_blocks], integers: the block that holds tokens [i * block_size, (i + 1) * block_size).
        context_lens: [batch], integers: tokens in each sequence.
        scale: Factor on every score, a number or an array of no axes; 1 / sqrt(head_dim) where it is None.
        kv_layout: "NHD", "HND" or "packed".
        return_lse: Return lse too.
        window: Tokens that are seen, the last of each sequence; all where it is None.
        softcap: A scaled score becomes softcap * tanh(score / softcap); None leaves it.
        alibi_slopes: [num_heads]: slope * (token - (context_len - 1)) is added to the score of a token.
        sinks: [num_heads]: one more score of each head's softmax, which has no value. -inf is no sink.
        score_mod: score_mod(score, batch, head, query_pos, key_pos), called with arrays in float64 and int64: of NumPy,
            or of torch where it is the score_mod of a spec that calls functions of torch.
        mask_mod: mask_mod(batch, head, query_pos, key_pos), called likewise: whether a key is seen.
        inputs: Arrays that these take by keyword, as far as they do. An element beyond the end of one, or at a negative
            index, makes the score of its key NaN.

    Returns:
        out: [batch, num_heads, value_dim], float64; 0 where there is no token, or no score but -inf.
        lse: [batch, num_heads], float64, with return_lse: the natural logarithm of the softmax's denominator,
            log sum_t exp(score_t), with the sink among the scores; -inf where there is none but -inf.
    """
    if kv_layout not in ("NHD", "HND", "packed"):
        raise ValueError(f"kv_layout: expected NHD, HND or packed, got {kv_layout!r}")
    batch, num_heads, _ = query.shape
    pair = 2 if kv_layout == "packed" and key_cache.dtype.name == "bfloat16" else 1
    out = np.zeros((batch, num_heads, value_cache.shape[3] // pair))
    lse = np.full((batch, num_heads), -np.inf) if sinks is None else np.tile(np.asarray(sinks, np.float64), (batch, 1))
    for sequence in np.flatnonzero(context_lens):
        seen = weigh(
            query[sequence],
            key_cache,
            value_cache,
            block_table[sequence],
            int(context_lens[sequence]),
            scale,
            kv_layout=kv_layout,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            score_mod=score_mod,
            mask_mod=mask_mod,
            inputs=inputs,
            batch=int(sequence),
        )
        out[sequence] = seen.out()
        lse[sequence] = seen.lse
    return (out, lse) if return_lse else out


def weigh(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    blocks: np.ndarray,
    context_len: int,
    scale: float | np.ndarray | None = None,
    *,
    kv_layout: str = "NHD",
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    score_mod: Functions | None = None,
    mask_mod: Functions | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    batch: int = 0,
) -> Weighed:
    """What the tokens of one sequence weigh.

    Args:
        query: [num_heads, head_dim].
        key_cache: This, value_cache and what follows scale are those of decode.
        value_cache: As key_cache.
        blocks: A row of block_table.
        context_len: Tokens of the sequence, from 1 on.
        scale: Factor on every score; 1 / sqrt(head_dim) where it is None.
        kv_layout: As for decode.
        window: As for decode.
        softcap: As for decode.
        alibi_slopes: As for decode.
        sinks: As for decode.
        score_mod: As for decode.
        mask_mod: As for decode.
        inputs: As for decode.
        batch: The number of the sequence, for functions.
    """
    num_heads, head_dim = query.shape
    position = np.arange(0 if window is None else max(0, context_len - window), context_len)
    kv_heads = key_cache.shape[2 if kv_layout == "NHD" else 1]
    by_kv_head = (kv_heads, num_heads // kv_heads, 1)
    grouped = query.astype(np.float64).reshape(kv_heads, -1, head_dim)
    places = reference_functions.Places(batch, context_len - 1, position, inputs or {})
    visible = is_nan = None
    if mask_mod is not None:
        visible, is_nan = places.mask(mask_mod, (kv_heads, grouped.shape[1], len(position)))
    is_seen: np.ndarray = np.ones(len(position), bool)
    if visible is not None:
        is_seen = np.asarray(visible.any(axis=(0, 1)))
    key, values = _gathered(key_cache, value_cache, blocks, position, is_seen, kv_layout)
    if visible is not None:
        key.swapaxes(1, 2)[~visible.any(axis=1)] = 0
        values[~visible.any(axis=1)] = 0
    factor = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    with np.errstate(invalid="ignore"):  # a key of infinities may be hidden from some heads
        scores = factor * (grouped @ key)
        magnitude = np.zeros(()) if score_mod is None else abs(factor) * (np.abs(grouped) @ np.abs(key))
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    given = scores
    if score_mod is not None:
        scores = places.score(score_mod, scores, visible)
    if alibi_slopes is not None:
        scores = scores + np.asarray(alibi_slopes, np.float64).reshape(by_kv_head) * (position - (context_len - 1))
    if visible is not None and is_nan is not None:
        scores = np.where(visible, np.where(is_nan, np.nan, scores), -np.inf)
    sink = np.full(by_kv_head, -np.inf) if sinks is None else np.asarray(sinks, np.float64).reshape(by_kv_head)
    peak = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    has_weight = peak != -np.inf
    weights = np.exp(scores - np.where(has_weight, peak, 0))
    row_sum = weights.sum(axis=-1, keepdims=True) + np.exp(sink - np.where(has_weight, peak, 0))
    row_sum = np.where(has_weight, row_sum, 1)
    lse = (peak + np.log(row_sum)).reshape(num_heads)
    return Weighed(scores, weights / row_sum, values, lse, given, magnitude, visible)


def _gathered(
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    blocks: np.ndarray,
    position: np.ndarray,
    is_seen: np.ndarray,
    kv_layout: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys [num_kv_heads, head_dim, tokens] and values [num_kv_heads, tokens, value_dim] of some tokens, in float64.

    Of a token that is not seen they are those of any other: the id of its block is not looked at.
    """
    if kv_layout == "packed":  # gathered element by element: [tokens, dim, num_kv_heads]
        pair = 2 if key_cache.dtype.name == "bfloat16" else 1
        block_size = pair * value_cache.shape[2]
        block, slot = np.where(is_seen, blocks[position // block_size], 0)[:, None], (position % block_size)[:, None]
        dim, out_dim = np.arange(pair * key_cache.shape[2]), np.arange(value_cache.shape[3] // pair)
        keys = key_cache[block, :, dim // pair, pair * slot + dim % pair].swapaxes(1, 2)
        values = value_cache[block, :, slot // pair, pair * out_dim + slot % pair].swapaxes(1, 2)
    else:
        if kv_layout == "HND":
            key_cache, value_cache = key_cache.swapaxes(1, 2), value_cache.swapaxes(1, 2)
        block_size = value_cache.shape[1]
        block, slot = np.where(is_seen, blocks[position // block_size], 0), position % block_size
        keys, values = key_cache[block, slot], value_cache[block, slot]
    # in C's order whatever the layout, since BLAS may sum in an order that depends on the strides
    return (
        keys.astype(np.float64, order="C").transpose(1, 2, 0),
        values.astype(np.float64, order="C").transpose(1, 0, 2),
    )
