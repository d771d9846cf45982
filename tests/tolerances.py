"""Comparisons with the float64 oracle, and with other results bit by bit.

The bounds are in pa_compiler.verification.tolerances, and are never widened to make a test pass.
"""

from __future__ import annotations

import numpy as np
from inputs import Inputs

from pa_compiler.verification.tolerances import oracle


def assert_close_to_oracle(spec, inputs: Inputs, out, lse=None, scale=None) -> None:
    """Compare with the float64 reference on the same stored bytes."""
    expected = oracle(spec, *inputs.arguments, scale, spec.kv_layout)
    assert out.shape == expected["out"][0].shape
    assert str(out.dtype) == spec.result_dtype
    _assert_within(out, *expected["out"], "out", inputs)

    if lse is not None:
        assert lse.dtype == np.float32
        empty = np.isneginf(expected["lse"][0])
        assert np.all(np.isneginf(lse[empty]))
        expected_lse, bound = (array[~empty] for array in expected["lse"])
        _assert_within(lse[~empty], expected_lse, bound, "lse", inputs)


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


def _assert_within(actual, expected, bound, name: str, inputs: Inputs) -> None:
    error = np.abs(actual.astype(np.float64) - expected)
    if not (error <= bound).all():  # a NaN is beyond every bound
        worst = np.nan_to_num(error / np.maximum(bound, np.finfo(float).tiny), nan=np.inf)
        where = tuple(int(i) for i in np.unravel_index(worst.argmax(), worst.shape))
        raise AssertionError(
            f"{name}: {(~(error <= bound)).sum()} of {error.size} elements out of tolerance; worst at {where}: "
            f"{actual[where]} != {expected[where]:.9g}, error {error[where]:.3g}, bound {bound[where]:.3g}; "
            f"context_lens {inputs.context_lens.tolist()}"
        )
