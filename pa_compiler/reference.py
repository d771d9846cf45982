"""Paged attention in NumPy, in float64: what every kernel is measured against.

It gathers, multiplies and takes a plain softmax over the whole sequence: no tiles, no online rescaling, nothing shared
with the kernels, so that a mistake in one cannot hide in the other.
"""

from __future__ import annotations

import math

import numpy as np


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
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attend from one query token per sequence to the first context_len tokens of that sequence.

    For each query head h, with kv head g = h // (num_heads // num_kv_heads) and tokens t < context_len:
    out[h] = sum_t softmax_t(scale * query[h] . key[t, g]) * value[t, g].

    A score of -inf has a weight of 0, and a head that has no other score is as in an empty sequence: out 0, lse -inf.

    One sequence is in float64 at a time, and only slots in use are read: a cache of any size, with anything in its
    other slots, and a block table with anything in its surplus entries, will do. Block ids are trusted.

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

    Returns:
        out: [batch, num_heads, value_dim], float64; 0 where there is no token, or no score but -inf.
        lse: [batch, num_heads], float64, with return_lse: the natural logarithm of the softmax's denominator,
            log sum_t exp(score_t); -inf where there is no token, or no score but -inf.
    """
    if kv_layout not in ("NHD", "HND", "packed"):
        raise ValueError(f"kv_layout: expected NHD, HND or packed, got {kv_layout!r}")
    if kv_layout == "HND":
        key_cache, value_cache = key_cache.swapaxes(1, 2), value_cache.swapaxes(1, 2)
    batch, num_heads, head_dim = query.shape
    if kv_layout == "packed":
        pair = 2 if key_cache.dtype.name == "bfloat16" else 1
        num_kv_heads, block_size = value_cache.shape[1], pair * value_cache.shape[2]
        value_dim = value_cache.shape[3] // pair
    else:
        _, block_size, num_kv_heads, value_dim = value_cache.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)

    out = np.zeros((batch, num_heads, value_dim))
    lse = np.full((batch, num_heads), -np.inf)
    for sequence in np.flatnonzero(context_lens):
        token = np.arange(context_lens[sequence])
        block, slot = block_table[sequence, token // block_size], token % block_size
        if kv_layout == "packed":  # gathered element by element: [tokens, dim, num_kv_heads]
            block, slot = block[:, None], slot[:, None]
            dim, out_dim = np.arange(head_dim), np.arange(value_dim)
            keys = key_cache[block, :, dim // pair, pair * slot + dim % pair].swapaxes(1, 2)
            values = value_cache[block, :, slot // pair, pair * out_dim + slot % pair].swapaxes(1, 2)
        else:
            keys, values = key_cache[block, slot], value_cache[block, slot]
        # in C's order whatever the layout, since BLAS may sum in an order that depends on the strides
        key = keys.astype(np.float64, order="C").transpose(1, 2, 0)  # [num_kv_heads, head_dim, tokens]
        value = values.astype(np.float64, order="C").transpose(1, 0, 2)  # [num_kv_heads, tokens, value_dim]
        grouped = query[sequence].astype(np.float64).reshape(num_kv_heads, -1, head_dim)

        scores = scale * (grouped @ key)  # [num_kv_heads, group, tokens]
        row_max = scores.max(axis=-1, keepdims=True)
        has_weight = row_max != -np.inf
        weights = np.exp(scores - np.where(has_weight, row_max, 0))
        row_sum = np.where(has_weight, weights.sum(axis=-1, keepdims=True), 1)
        out[sequence] = (weights / row_sum @ value).reshape(num_heads, value_dim)
        lse[sequence] = (row_max + np.log(row_sum)).reshape(num_heads)
    return (out, lse) if return_lse else out
