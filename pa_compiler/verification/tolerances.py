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


def tolerance(spec: PagedAttentionSpec, longest: int) -> Tolerance:
    """The bound on out for sequences of up to longest tokens: that of the coarser of dtype and result_dtype."""
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
