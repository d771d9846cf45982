"""Paged attention in NumPy, in float64: what every kernel is measured against.

It gathers, multiplies and takes a plain softmax over the whole sequence: no tiles, no online rescaling, nothing shared
with the kernels, so that a mistake in one cannot hide in the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pa_compiler.reference_weights import Functions, extents, tokens_of, weigh


def decode(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    block_table: np.ndarray | tuple[np.ndarray, np.ndarray],
    context_lens: np.ndarray,
    scale: float | np.ndarray | None = None,
    *,
    kv_layout: str = "NHD",
    return_lse: bool = False,
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
            [num_blocks, num_kv_heads, head_dim / 2, 2 * block_size], pairs along head_dim. A cache of uint8 holds two
            codes of 4 bits in a byte, of which the first is low: its last axis has half of the elements, and packed
            they are in pairs as those of bfloat16.
        value_cache: The same shape as key_cache, but for value_dim in the place of head_dim; for "packed"
            [num_blocks, num_kv_heads, block_size, value_dim], and if the dtype is bfloat16
            [num_blocks, num_kv_heads, block_size / 2, 2 * value_dim], pairs along tokens. Where values are the first
            elements of keys, a view of those: key_cache[..., :value_dim].
        block_table: [batch, max_blocks], integers: the block that holds tokens [i * block_size, (i + 1) * block_size).
            Or a pair (indptr, indices), [batch + 1] and [n]: sequence b has indices[indptr[b] : indptr[b + 1]].
        context_lens: [batch], integers: tokens in each sequence.
        scale: Factor on every score, a number or an array of no axes; 1 / sqrt(head_dim) where it is None.
        kv_layout: "NHD", "HND" or "packed".
        return_lse: Return lse too.
        window: Tokens that are seen, the last of each sequence; all where it is None.
        softcap: A scaled score becomes softcap * tanh(score / softcap); None leaves it.
        alibi_slopes: [num_heads]: slope * (token - (context_len - 1)) is added to the score of a token.
        sinks: [num_heads]: one more score of each head's softmax, which has no value. -inf is no sink.
        key_scale: What elements of key_cache count: [1], [num_kv_heads], or [num_blocks, num_kv_heads, block_size],
            which with an axis of 2 has zero points too: number = scale * code + zero point.
        value_scale: The same of value_cache.
        kv_rotation: "hadamard" where the caches hold keys and values times H / sqrt(dim), with Sylvester's H of 1 and
            -1: they are multiplied by it again. None and "none" leave them.
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
    lengths = np.asarray(context_lens)
    starts = np.concatenate([[0], np.cumsum(lengths > 0)])  # an empty sequence has no token to ask for
    used = np.flatnonzero(lengths)
    arrays = (key_cache, value_cache, block_table, context_lens, starts)
    fields: dict[str, Any] = {
        "kv_layout": kv_layout,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "key_scale": key_scale,
        "value_scale": value_scale,
        "kv_rotation": kv_rotation,
    }
    fields |= {"score_mod": score_mod, "mask_mod": mask_mod, "inputs": inputs}
    found, found_lse = attend(query[used], *arrays, scale, return_lse=True, **fields)
    out = np.zeros((len(query), *found.shape[1:]))
    lse = (
        np.full(query.shape[:2], -np.inf) if sinks is None else np.tile(np.asarray(sinks, np.float64), (len(query), 1))
    )
    out[used], lse[used] = found, found_lse
    return (out, lse) if return_lse else out


def attend(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    block_table: np.ndarray | tuple[np.ndarray, np.ndarray],
    context_lens: np.ndarray,
    query_start_loc: np.ndarray,
    scale: float | np.ndarray | None = None,
    *,
    kv_layout: str = "NHD",
    return_lse: bool = False,
    causal: bool = True,
    tree_mask: np.ndarray | None = None,
    **fields: Any,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attend from any number of query tokens of each sequence, its last ones.

    Query token i of n is at position context_len - n + i and sees the keys up to its own; all keys where causal is
    False; and with tree_mask those before the n tokens, and of these those that its row says. Otherwise as decode.

    Args:
        query: [num_tokens, num_heads, head_dim], any floating dtype: those of one sequence after another.
        key_cache: As for decode.
        value_cache: As for decode.
        block_table: As for decode.
        context_lens: [batch], integers: tokens of each sequence, its query tokens among them.
        query_start_loc: [batch + 1], integers from 0 to num_tokens: where those of each sequence begin, and the end.
        scale: As for decode.
        kv_layout: As for decode.
        return_lse: Return lse too.
        causal: Whether a query token sees nothing after itself.
        tree_mask: [sum of n * n], bool or uint8: for each sequence [n, n] row after row, which of its query tokens
            (columns) each of them (rows) sees.
        **fields: window, softcap, alibi_slopes, sinks, key_scale, value_scale, kv_rotation, score_mod, mask_mod and
            inputs, as for decode. A window is of keys from query_pos - window + 1 on.

    Returns:
        out: [num_tokens, num_heads, value_dim], float64; 0 where a token sees no key, or no score but -inf.
        lse: [num_tokens, num_heads], float64, with return_lse.
    """
    if kv_layout not in ("NHD", "HND", "packed"):
        raise ValueError(f"kv_layout: expected NHD, HND or packed, got {kv_layout!r}")
    out = np.zeros((*query.shape[:2], extents(value_cache, kv_layout)[1]))
    lse = np.full(query.shape[:2], -np.inf)
    for batch, token, seen in tokens_of(context_lens, query_start_loc, causal=causal, tree_mask=tree_mask):
        of = (query[token], key_cache, value_cache, blocks_of(block_table, batch), seen, scale)
        weighed = weigh(*of, kv_layout=kv_layout, batch=batch, **fields)
        out[token], lse[token] = weighed.out(), weighed.lse
    return (out, lse) if return_lse else out


def blocks_of(block_table: np.ndarray | tuple[np.ndarray, np.ndarray], batch: int) -> np.ndarray:
    """The blocks of a sequence: its row of a table, or its part of the indices of a pair."""
    if isinstance(block_table, tuple):
        indptr, indices = block_table
        return indices[indptr[batch] : indptr[batch + 1]]
    return block_table[batch]


def merge_states(
    outs: np.ndarray, lses: np.ndarray, *, return_lse: bool = False
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """The result of attention to all keys, from those of attention to parts of them.

    out = sum_p exp(lse_p - lse) * out_p with lse = log sum_p exp(lse_p). A part whose lse is -inf is empty, whatever
    its out. Where some are inf, these alone count, and each as much as the others.

    Args:
        outs: [parts, num_tokens, num_heads, value_dim], any floating dtype.
        lses: [parts, num_tokens, num_heads], natural logarithms.
        return_lse: Return lse too.

    Returns:
        out: [num_tokens, num_heads, value_dim], float64; 0 where all parts are empty.
        lse: [num_tokens, num_heads], float64, with return_lse; -inf where all parts are empty.
    """
    lses = np.asarray(lses, np.float64)
    largest = lses.max(axis=0)
    below = np.subtract(lses, largest, out=np.zeros_like(lses), where=lses != largest)
    weights = np.where(np.isneginf(lses), 0, np.exp(below))
    total = weights.sum(axis=0)
    values = np.where(np.isneginf(lses)[..., None], 0, np.asarray(outs, np.float64))
    out = (weights[..., None] * values).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    return (out, largest + np.log(np.where(total == 0, 1, total))) if return_lse else out


def attend_shared_prefix(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    prefix_table: np.ndarray,
    prefix_len: int | np.ndarray,
    block_table: np.ndarray | tuple[np.ndarray, np.ndarray],
    context_lens: np.ndarray,
    query_start_loc: np.ndarray | None = None,
    scale: float | np.ndarray | None = None,
    *,
    prefix_start_loc: np.ndarray | None = None,
    **fields: Any,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attend where sequences begin with a prefix: what attend gives with the prefix's blocks in their rows.

    Args:
        query: [num_tokens, num_heads, head_dim], any floating dtype: those of one sequence after another.
        key_cache: As for decode.
        value_cache: As for decode.
        prefix_table: [num_prefixes, max_prefix_blocks], integers, or the one row that there is.
        prefix_len: Tokens of each prefix, whole blocks: [num_prefixes], integers, or one int.
        block_table: As for decode. A sequence's entries for its prefix are not looked at.
        context_lens: [batch], integers: tokens of each sequence, those of its prefix among them.
        query_start_loc: As for attend; None where each sequence has one query token.
        scale: As for decode.
        prefix_start_loc: [num_prefixes + 1]: where the sequences of each prefix begin; None where there is one prefix.
        **fields: As for attend, but for causal and tree_mask; return_lse among them.

    Returns:
        out, or (out, lse), as attend.
    """
    kv_layout = fields.get("kv_layout", "NHD")
    batch = len(context_lens)
    starts = np.arange(batch + 1) if query_start_loc is None else query_start_loc
    groups = np.array([0, batch]) if prefix_start_loc is None else prefix_start_loc
    lens, tables = np.atleast_1d(prefix_len), np.atleast_2d(prefix_table)
    block_size = extents(value_cache, kv_layout)[0]
    rows = [blocks_of(block_table, sequence).copy() for sequence in range(batch)]
    for prefix in range(len(groups) - 1):
        shared = int(lens[prefix]) // block_size
        for sequence in range(int(groups[prefix]), int(groups[prefix + 1])):
            if starts[sequence + 1] > starts[sequence]:  # else it has no query tokens, and its row any length
                rows[sequence][:shared] = tables[prefix, :shared]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    whole = (indptr, np.concatenate([np.zeros(0, np.int64), *rows]))
    return attend(query, key_cache, value_cache, whole, context_lens, starts, scale, **fields)
