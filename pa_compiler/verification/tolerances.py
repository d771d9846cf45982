"""How far a result may be from the float64 reference: the one table, for the tests, the commands and Module.verify.

The bounds come from the arithmetic of each type, and are never widened to make a result pass. comparison.py has the
oracle, and compares with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pa_compiler.spec import PagedAttentionSpec


class Tolerance(NamedTuple):
    """Bound on abs(out - oracle) of an element: of_out * abs(oracle) + of_magnitude * magnitude.

    magnitude is sum_j p_j abs(v_j): what the sum would be if nothing cancelled.
    """

    of_out: float
    of_magnitude: float


TOLERANCES = {
    "float32": Tolerance(0.0, 1e-5),
    "float16": Tolerance(1e-3, 1e-3),
    "bfloat16": Tolerance(1e-2, 8e-3),
}
"""By compute dtype, from its arithmetic; finer ones first."""

LONG_FLOAT32 = Tolerance(0.0, 3e-5)
"""float32 where a sequence is longer than 8192 tokens."""

LSE_TOLERANCES = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""abs(lse - oracle) <= this + 1e-5 * (1 + abs(oracle)): what one rounding of every weight to dtype does to the
logarithm of their sum, and float32's share in the scores."""

ROUNDING = 2.0**-24
"""Of float32: the relative error of one operation."""

TANH_ERROR = 5e-7
"""Relative error of the kernels' tanh in float32, at most, as that says of itself."""

CAP_ERROR = 4 * ROUNDING + TANH_ERROR
"""Relative error that a soft cap adds to a score. With t = s / cap it is of the cap's own rounding to float32, of the
quotient (twice where it is a product with a rounded 1 / cap; |t| tanh'(t) <= |tanh(t)|), of tanh, and of the product
with the cap. What was wrong with s before becomes no larger: the derivative of a cap is at most 1."""

SUM_ERRORS = 4.0
"""A sum of n products in float32 is wrong by this * sqrt(n) * ROUNDING of the sum of their magnitudes, at most: errors
of either sign add up like a random walk (N. Higham and T. Mary, 2019). It counts where a score_mod makes it larger."""

LOST_WEIGHT = 1e-28
"""Weights below it, of the largest, may count as 0. Beside a large sink that may be all of them."""

HALF_A_UNIT = 2.0**-15
"""Of a row's largest magnitude: by how much a query, or a weight, is wrong as an integer of 16 bits. The largest is
2**14 units or more, and a number is rounded to the nearest (kernels/integers.py)."""

HALF_OF_BYTES = (0.5 + 127 * 4 * ROUNDING) / 127
"""The same as an integer of 8 bits, whose unit is a 127th of the largest magnitude. What divides by it, and the
products with both, are rounded, each by ROUNDING of up to 127 units."""

LONGEST_TILE = 512
"""Tokens whose weights have one unit, at most."""

LEAST_STEP = 2.0**-125
"""Times the tokens: by how much a weight is wrong at least, since units are normal numbers of float32, of weights with
headroom."""

SMALLEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}
"""By result dtype, what rounding leaves in an out that is small: half of the distance between the smallest numbers.
Values of types with float32's range are never so small that it counts there."""

SMALLEST_SUM = 1e-37
"""Times the square of the tokens: what sums of products below float32's normal numbers leave in out. They count where a
sink makes all weights small."""


def tolerance(spec: PagedAttentionSpec, longest: int) -> Tolerance:
    """The bound on out for sequences of up to longest tokens: that of the coarser of dtype and result_dtype.

    Of a sequence the tokens in the window count.
    """
    longest = min(longest, spec.window or longest)
    found = max(TOLERANCES[str(dtype)] for dtype in (spec.dtype, spec.result_dtype))
    return LONG_FLOAT32 if found == TOLERANCES["float32"] and longest > 8192 else found


def out_bound(
    spec: PagedAttentionSpec, context_lens: np.ndarray, expected: np.ndarray, magnitude: np.ndarray
) -> np.ndarray:
    """The bound on each element of out.

    Args:
        spec: What was computed.
        context_lens: [batch], tokens.
        expected: [batch, num_heads, result_dim], the oracle's out in float64.
        magnitude: The same shape: the oracle's out for abs(value_cache).
    """
    per_sequence = [tolerance(spec, length) for length in context_lens.tolist()]
    of_out, of_magnitude = np.array(per_sequence, np.float64).reshape(-1, 2).T[..., None, None]
    return of_out * np.abs(expected) + of_magnitude * magnitude


def lse_bound(spec: PagedAttentionSpec, expected: np.ndarray) -> np.ndarray:
    """The bound on each element of lse, from the oracle's; 0 where that is -inf, where nothing weighs anything."""
    bound = LSE_TOLERANCES[spec.dtype] + 1e-5 * (1 + np.abs(expected))
    return np.where(np.isneginf(expected), 0.0, bound)


def score_bound(spec: PagedAttentionSpec, scores: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The bound on what a soft cap and ALiBi add to the error of each score, which is that of its weight.

    A bias is one product and one sum; where float32 has the result of one of them, as of whole numbers, it is exact.

    Args:
        spec: What was computed.
        scores: The oracle's, as the softmax takes them.
        bias: slope * distance, of the same shape; None without ALiBi.
    """
    bound = np.zeros(scores.shape)
    if spec.softcap is not None and spec.score_mod is None:  # else that of the function has it
        bound += CAP_ERROR * np.abs(scores if bias is None else scores - bias)
    for rounded in () if bias is None else (bias, scores):
        with np.errstate(over="ignore"):
            is_exact = rounded.astype(np.float32) == rounded
        bound += np.where(is_exact, 0.0, ROUNDING * np.abs(rounded))
    return bound


def half_a_unit(spec: PagedAttentionSpec) -> float:
    """By how much queries and weights are wrong, of a row's largest, where codes may be multiplied by integers; or 0.

    Of 8 bits with kv_dots, and of 16 on CPUs that have instructions for it.
    """
    if spec.byte_dots:
        return HALF_OF_BYTES
    return HALF_A_UNIT if spec.kv_dtype == "int8" and spec.dtype != "float32" and not spec.rotates else 0.0


def _added_up(errors: np.ndarray, axis: int) -> np.ndarray:
    """What errors of either sign come to: all of one sign, or a random walk (SUM_ERRORS), whichever is less."""
    errors = np.where(np.isfinite(errors), errors, 0)
    return np.minimum(errors.sum(axis=axis), SUM_ERRORS * np.sqrt((errors**2).sum(axis=axis)))


def integer_scores(query: np.ndarray, keys: np.ndarray, factor: float, half: float) -> np.ndarray:
    """What the units of queries add to the error of each score.

    Args:
        query: [num_kv_heads, group, head_dim], as it is multiplied: rotated where keys are.
        keys: [num_kv_heads, head_dim, tokens], what the cache says of them: zero points multiply the integers' sum.
        factor: The scale of scores.
        half: half_a_unit.

    Returns:
        [num_kv_heads, group, tokens].
    """
    step = half * abs(factor) * np.abs(query.astype(np.float64)).max(axis=-1, initial=0)
    return np.where(np.isfinite(step), step, 0)[..., None] * _added_up(np.abs(keys), axis=1)[:, None]


def integer_weights(
    spec: PagedAttentionSpec, weights: np.ndarray, values: np.ndarray, scale: np.ndarray, half: float
) -> np.ndarray:
    """What the units of weights add to the bound on out of one query token [num_heads, result_dim].

    A weight is that of the softmax times the scale of the token's value, and its unit goes by the largest one in its
    tile of tokens: which lies within the LONGEST_TILE tokens that a token is one of, and those before and after them.

    Args:
        spec: What was computed.
        weights: [num_kv_heads, group, tokens], p.
        values: [num_kv_heads, tokens, result_dim], what weights are wrong with: v, or with zero points v less what it
            were with the middle code in all elements, for which the kernels make up.
        scale: [num_kv_heads, tokens], of the values.
        half: half_a_unit.
    """
    tokens = weights.shape[-1]
    scale = np.where(np.isfinite(scale), np.abs(scale), 0)
    codes = np.divide(np.abs(values), scale[..., None], out=np.zeros(values.shape), where=scale[..., None] > 0)
    of_tile = weights * scale[:, None]
    starts = np.arange(0, tokens, LONGEST_TILE)
    maxima = np.maximum.reduceat(of_tile, starts, axis=-1) if tokens else of_tile
    padded = np.pad(maxima, ((0, 0), (0, 0), (1, 1)))
    around = np.maximum(np.maximum(padded[..., :-2], padded[..., 2:]), maxima)
    step = half * np.repeat(around, LONGEST_TILE, axis=-1)[..., :tokens] + LEAST_STEP * tokens
    found = [
        [_added_up(row[:, None] * of_head, axis=0) for row in rows] for rows, of_head in zip(step, codes, strict=True)
    ]
    return np.array(found).reshape(spec.num_heads, -1)


def of_weights(
    spec: PagedAttentionSpec, weights: np.ndarray, values: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the bounds on out and lse of one sequence have beside TOLERANCES: by score functions, and by small numbers.

    To first order an error e_j of each score changes out by sum_j p_j e_j (v_j - out), and lse by sum_j p_j e_j.

    Args:
        spec: What was computed.
        weights: [num_kv_heads, group, tokens], p.
        values: [num_kv_heads, tokens, result_dim], v.
        scores: As weights: the bound on each score's error.

    Returns:
        Arrays [num_heads, result_dim] and [num_heads].
    """
    magnitudes = np.abs(values)
    moved = np.multiply(weights, scores, where=weights > 0, out=np.zeros(weights.shape))
    of_lse = moved.sum(axis=-1)
    of_out = moved @ magnitudes + of_lse[..., None] * np.abs(weights @ values)
    of_out += np.where(weights @ magnitudes > 0, SMALLEST[spec.result_dtype], 0)
    if spec.sinks:
        of_out += np.where(weights < LOST_WEIGHT, weights, 0) @ magnitudes + SMALLEST_SUM * weights.shape[-1] ** 2
    return of_out.reshape(spec.num_heads, -1), of_lse.reshape(spec.num_heads)
