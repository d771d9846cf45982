"""Comparisons with the float64 oracle, and with other results bit by bit.

The bounds are in pa_compiler.verification.tolerances, and are never widened to make a test pass.
"""

from __future__ import annotations

import numpy as np
from inputs import Inputs

from pa_compiler.verification.comparison import compare, oracle


def assert_close_to_oracle(spec, inputs: Inputs, out, lse=None, scale=None) -> None:
    """Compare with the float64 reference on the same stored bytes."""
    expected = oracle(spec, *inputs.arguments, scale, spec.kv_layout, **inputs.heads)
    assert str(out.dtype) == spec.result_dtype
    assert lse is None or lse.dtype == np.float32
    for name, result in (("out", out), ("lse", lse)):
        if result is not None:
            _, wrong = compare(name, result, *expected[name], inputs.context_lens)
            assert not wrong, f"{wrong}; context_lens {inputs.context_lens.tolist()}"


def assert_same_bits(actual, expected) -> None:
    """Equal byte for byte: NaNs, the sign of zero and all."""
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if actual.tobytes() != expected.tobytes():
        differing = actual.view(f"u{actual.itemsize}") != expected.view(f"u{actual.itemsize}")
        where = tuple(int(i) for i in np.argwhere(differing)[0])
        raise AssertionError(
            f"{differing.sum()} of {actual.size} elements differ, "
            f"first at {where}: {actual[where]} != {expected[where]}"
        )
