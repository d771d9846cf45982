"""Comparisons with the float64 oracle, and with other results bit by bit.

The bounds are in pa_compiler.tolerances, and are never widened to make a test pass.
"""

from __future__ import annotations

import numpy as np
from inputs import Inputs

import pa_compiler
from pa_compiler.tolerances import lse_bound, out_bound


def assert_close_to_oracle(spec, inputs: Inputs, out, lse=None, scale=None) -> None:
    """Compare with pa_compiler.reference on the same stored bytes.

    The coarser of dtype and out_dtype sets the bound. A comes out of the reference too: it takes |value| as more
    columns of value.
    """
    values = np.concatenate([inputs.value_cache, np.abs(inputs.value_cache)], axis=-1)
    arguments = (inputs.query, inputs.key_cache, values, inputs.block_table, inputs.context_lens, scale)
    both, expected_lse = pa_compiler.reference.decode(*arguments, kv_layout=spec.kv_layout, return_lse=True)
    expected, magnitude = both[..., : spec.head_dim], both[..., spec.head_dim :]

    assert out.shape == expected.shape
    assert str(out.dtype) == spec.out_dtype
    _assert_within(out, expected, out_bound(spec, inputs.context_lens, expected, magnitude), "out", inputs)

    if lse is not None:
        assert lse.dtype == np.float32
        empty = inputs.context_lens == 0
        assert np.all(np.isneginf(lse[empty]))
        bound = lse_bound(spec, expected_lse[~empty])
        _assert_within(lse[~empty], expected_lse[~empty], bound, "lse", inputs)


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
