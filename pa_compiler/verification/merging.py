"""Drawn calls of merge_states beside the reference: results of parts, some of them empty, with any logarithms."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pa_compiler import reference
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification.comparison import Errors, compare
from pa_compiler.verification.tolerances import SMALLEST, TOLERANCES

_PARTS, _TOKENS = (1, 2, 3, 9, 33), (0, 1, 2, 17, 64)
_SPREADS = (1.0, 20.0, 1e4)
_EMPTY = 0.3
"""Of parts."""


class Merges(Protocol):
    """What a comparison needs of a Module."""

    spec: PagedAttentionSpec

    def merge_states(self, *arguments: Any, **options: Any) -> Any:
        """As Module.merge_states."""


def merge_drawn(module: Merges, seed: int, number: int) -> tuple[dict[str, Errors], list[str]]:
    """Make the call of a seed and a number. Returns the errors of its results by name, and what is wrong, in words."""
    spec, rng = module.spec, np.random.default_rng((seed, number, 1))
    shape = (int(rng.choice(_PARTS)), int(rng.choice(_TOKENS)), spec.num_heads, spec.result_dim)
    outs = rng.standard_normal(shape, np.float32)
    lses = (float(rng.choice(_SPREADS)) * rng.standard_normal(shape[:3])).astype(np.float32)
    lses[rng.random(lses.shape) < _EMPTY] = -np.inf
    outs[np.isneginf(lses)] = np.nan
    outs = outs.astype(spec.result_dtype if rng.random() < 0.5 else "float32")
    found = module.merge_states(outs, lses, return_lse=True)
    expected = reference.merge_states(outs, lses, return_lse=True)
    magnitude = np.asarray(reference.merge_states(np.abs(outs), lses))
    of_out, of_magnitude = TOLERANCES[spec.result_dtype]
    bounds = (of_out * np.abs(expected[0]) + of_magnitude * magnitude + SMALLEST[spec.result_dtype] * (magnitude > 0),
              np.where(np.isneginf(expected[1]), 0, 1e-5 * (1 + np.abs(expected[1]))))  # fmt: skip
    errors, wrong = {}, []
    for name, result, right, bound in zip(("out", "lse"), found, expected, bounds, strict=True):
        errors[name], message = compare(name, result, right, bound, np.full(shape[1], shape[0]), "{} parts")
        wrong += [f"merge_states: {message}"] if message else []
    return errors, wrong
