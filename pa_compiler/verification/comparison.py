"""A result beside the float64 reference: the oracle with its bounds, and how far from it a result is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pa_compiler.reference_weights import Seen, Weighed, gathered, numbers_of, rotated, scales_of, tokens_of, weigh
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification.inputs import constant_arrays
from pa_compiler.verification.intervals import error_bound
from pa_compiler.verification.tolerances import (
    CAP_ERROR,
    ROUNDING,
    SUM_ERRORS,
    half_a_unit,
    integer_scores,
    integer_weights,
    lse_bound,
    of_weights,
    out_bound,
    score_bound,
)

MIDDLE_CODE = 7.5
"""Of codes of 4 bits."""


class Errors(NamedTuple):
    """The largest errors of a result against the reference; infinite where it is NaN and should not be."""

    absolute: float
    """As they are."""
    of_tolerance: float
    """As a fraction of the bound: a result is right up to 1."""


def oracle(
    spec: PagedAttentionSpec,
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray | None,
    block_table: np.ndarray,
    context_lens: np.ndarray,
    scale: float | None = None,
    kv_layout: str = "NHD",
    advance: Callable[[int], object] = lambda sequences: None,
    *,
    query_start_loc: np.ndarray | None = None,
    causal: bool = True,
    tree_mask: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    key_scale: np.ndarray | None = None,
    value_scale: np.ndarray | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What "out" and "lse" should be, in float64, each with the bound on every element's error.

    One sequence is in float64 at a time.

    Args:
        spec: What is computed.
        query: This and the other arrays are those of reference.decode, or with query_start_loc of reference.attend.
        key_cache: In kv_layout.
        value_cache: In kv_layout; None for shared_kv, where the values are the first elements of the keys.
        block_table: Entries of tokens that are not seen may hold anything.
        context_lens: Tokens of each sequence.
        scale: Factor of the scores.
        kv_layout: It may be another than the spec's.
        advance: Called with the number of sequences that are done, for a progress bar.
        query_start_loc: Of reference.attend. None where each sequence has one query token, or has no tokens at all.
        causal: Of reference.attend.
        tree_mask: Of reference.attend.
        alibi_slopes: Of reference.decode, for a spec with alibi.
        sinks: Of reference.decode, for a spec with sinks.
        key_scale: Of reference.decode, for a spec with a kv_dtype.
        value_scale: Likewise.
        inputs: Of reference.decode, for a spec with inputs.
    """
    out, magnitude, of_out = (np.zeros((*query.shape[:2], spec.result_dim)) for _ in range(3))
    lse, of_lse = np.full(query.shape[:2], -np.inf), np.zeros(query.shape[:2])
    if sinks is not None:
        lse[...] = sinks
    if value_cache is None:
        value_cache = key_cache[..., : spec.result_dim]
    fields: dict[str, Any] = {"kv_layout": kv_layout, "window": spec.window, "softcap": spec.softcap}
    fields |= {"alibi_slopes": alibi_slopes, "sinks": sinks, "key_scale": key_scale, "value_scale": value_scale}
    fields["kv_rotation"] = spec.rotation
    fields |= {"score_mod": spec.score_mod, "mask_mod": spec.mask_mod, "inputs": inputs}
    arrays = {**(inputs or {}), **constant_arrays(spec)}
    num_keys, done = np.zeros(len(query), np.int64), 0
    for row, sequence, seen in _queries(np.asarray(context_lens), query_start_loc, causal, tree_mask):
        of = (query[row], key_cache, value_cache, block_table[sequence], seen, scale)
        found = weigh(*of, **fields, batch=sequence)
        out[row], lse[row], num_keys[row] = found.out(), found.lse, len(found.position)
        values = np.where(np.isfinite(found.values), found.values, 0)  # others come out, or this head does not see them
        added = np.where(np.isfinite(found.added), found.added, 0)
        magnitude[row] = (found.weights @ added).reshape(out[row].shape)
        bias = _bias(alibi_slopes, found, seen.query_pos)
        of_scores = score_bound(spec, found.scores, bias)
        of_given, of_integers = np.zeros(()), np.zeros(())
        if half_a_unit(spec):
            caches = key_cache, value_cache, key_scale, value_scale
            of_query = query[row], block_table[sequence], scale
            of_given, of_integers = _of_integers(spec, *of_query, caches, kv_layout, found)
        if spec.score_mod is not None:
            places = {"batch": sequence, "query_pos": seen.query_pos}
            of_scores += _of_function(spec, found, bias, places, arrays, of_given)
        else:
            of_scores += of_given
        of_out[row], of_lse[row] = of_weights(spec, found.weights, values, of_scores)
        of_out[row] += of_integers
        advance(sequence - done)
        done = sequence
    advance(len(context_lens) - done)
    of_out += out_bound(spec, num_keys, out, magnitude)
    return {"out": (out, of_out), "lse": (lse, of_lse + lse_bound(spec, lse))}


def _of_integers(
    spec: PagedAttentionSpec,
    query: np.ndarray,
    blocks: np.ndarray,
    scale: float | None,
    caches: tuple[Any, ...],
    kv_layout: str,
    seen: Weighed,
) -> tuple[np.ndarray, np.ndarray]:
    """What integers add to the errors of one query token's scores, and to the bound on its out."""
    key_cache, value_cache, key_scale, value_scale = caches
    keys, values = gathered(key_cache, value_cache, blocks, seen.position, kv_layout)
    of_values = scales_of(value_scale, blocks, seen.position, spec.num_kv_heads, spec.block_size)
    factor, half = 1 / math.sqrt(spec.head_dim) if scale is None else float(scale), half_a_unit(spec)
    grouped, wrong = query.reshape(spec.num_kv_heads, spec.group, -1), seen.values
    if spec.has_zeros:
        middle = value_scale[..., [0, 0]].astype(np.float64)
        middle[..., 1] *= -MIDDLE_CODE
        wrong = numbers_of(values, middle, blocks, seen.position, spec.block_size, spec.rotation)[0]
        of_values = of_values[..., 0]
    if spec.rotates:
        grouped = rotated(grouped)
    with np.errstate(invalid="ignore"):
        stored = numbers_of(keys.swapaxes(1, 2), key_scale, blocks, seen.position, spec.block_size, None)[0]
        of_scores = integer_scores(grouped, stored.swapaxes(1, 2), factor, half)
    return of_scores, integer_weights(spec, seen.weights, wrong, of_values, half)


def _queries(
    context_lens: np.ndarray, query_start_loc: np.ndarray | None, causal: bool, tree_mask: np.ndarray | None
) -> Iterator[tuple[int, int, Seen]]:
    """The rows of query that see something: each with its sequence."""
    if query_start_loc is None:
        starts = np.concatenate([[0], np.cumsum(context_lens > 0)])
        yield from ((sequence, sequence, seen) for sequence, _, seen in tokens_of(context_lens, starts))
        return
    for sequence, row, seen in tokens_of(context_lens, query_start_loc, causal=causal, tree_mask=tree_mask):
        yield row, sequence, seen


def _of_function(
    spec: PagedAttentionSpec,
    seen: Weighed,
    bias: np.ndarray | None,
    places: Mapping[str, int],
    arrays: Mapping[str, np.ndarray],
    of_integers: np.ndarray,
) -> np.ndarray:
    """What score_mod adds to the errors of weights: by its own rounding, and by what was wrong with a score before.

    The latter is in TOLERANCES as far as the function does not make it larger, but for what integers add to it. A
    weight is wrong by exp(e) - 1.
    """
    head = np.arange(spec.num_heads).reshape(*seen.scores.shape[:2], 1)
    arguments = {name: np.array(place) for name, place in places.items()}
    arguments |= {"score": seen.given, "head": head, "key_pos": seen.position}
    before = SUM_ERRORS * np.sqrt(spec.head_dim) * ROUNDING * seen.magnitude
    of_given = before + of_integers + (0 if spec.softcap is None else CAP_ERROR * np.abs(seen.given))
    exact = seen.scores if bias is None else seen.scores - bias
    error = error_bound(spec.score_mod.result, exact, arguments, of_given, arrays)
    return np.asarray(np.expm1(np.clip(error - before, 0, 700)))


def _bias(slopes: np.ndarray | None, seen: Weighed, query_pos: int) -> np.ndarray | None:
    """ALiBi's share of scores [num_kv_heads, group, tokens]."""
    if slopes is None:
        return None
    return np.asarray(slopes, np.float64).reshape(*seen.scores.shape[:2], 1) * (seen.position - query_pos)


def compare(
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    bound: np.ndarray,
    context_lens: np.ndarray,
    of: str = "a sequence of {} tokens",
) -> tuple[Errors, str]:
    """The errors of a result of that name, and what is wrong with it, or "".

    expected and bound are the oracle's, and context_lens the tokens of each row's sequence, or what `of` says.
    """
    if actual.shape != expected.shape:
        return Errors(np.inf, np.inf), f"{name}: expected shape {expected.shape}, got {actual.shape}"
    if not actual.size:
        return Errors(0.0, 0.0), ""
    exact = actual.astype(np.float64)
    error = np.abs(np.subtract(exact, expected, out=np.zeros(exact.shape), where=exact != expected))
    error[np.isnan(exact) & np.isnan(expected)] = 0  # as of a function that reads outside of its inputs
    error[np.isnan(error)] = np.inf
    # Where the bound is 0, as of an empty sequence, a result has to be met exactly.
    fraction = np.divide(error, bound, out=np.where(error == 0, 0.0, np.inf), where=bound > 0)
    errors = Errors(float(error.max()), float(fraction.max()))
    if errors.of_tolerance <= 1:
        return errors, ""
    at = tuple(int(i) for i in np.unravel_index(fraction.argmax(), fraction.shape))
    return errors, (
        f"{name}: {np.sum(fraction > 1)} of {error.size} elements out of tolerance, the worst at {list(at)}, of "
        f"{of.format(context_lens[at[0]])}: expected {expected[at]:.9g}, got {exact[at]:.9g}, "
        f"{errors.of_tolerance:.3g} of the bound"
    )
