"""What the tests of caches of integer codes share: rows with defined codes, rows that are not finite, and hard ones."""

from __future__ import annotations

import numpy as np
from inputs import make_inputs
from tolerances import assert_same_bits

DEFINED = {
    "zeros": ([0.0, -0.0, 0.0], [0, 0, 0], 0.0),
    "the largest is 127": ([-3.0, 1.5, 0.0], [-127, 64, 0], 3 / 127),  # 63.5 is a tie: to the even
    "ties": ([127.0, 0.5, 1.5], [127, 0, 2], 1.0),
    "an infinity": ([np.inf, 1.0, -np.inf], [0, 0, 0], np.inf),
    "NaN": ([np.nan, 1.0, np.inf], [0, 0, 0], np.nan),
    "a scale of 0": ([2.0**-149, 0.0, 0.0], [0, 0, 0], 0.0),
    "the largest numbers": ([3.4e38, -3.4e38, 1.0], [127, -127, 0], np.float32(3.4e38) / np.float32(127)),
}
"""A row, its codes as int8, and its scale."""


def one_large_element(inputs):
    inputs.query[..., 3] = 200


def queries_of_all_sizes(inputs):
    sizes = np.logspace(-20, 2, inputs.query.shape[1]).astype(inputs.query.dtype)
    inputs.query[...] *= sizes[:, None]


def one_token_of_weight(inputs):
    inputs.query[...] *= 40


def scales_of_all_sizes(inputs):
    scale = inputs.heads["value_scale"]
    with np.errstate(over="ignore"):  # of slots that hold no token
        of_slots = np.logspace(-12, 6, scale.shape[2], dtype=np.float32)
        scale *= of_slots.reshape(-1, *[1] * (scale.ndim - 3))


HARD_FOR_A_UNIT = (one_large_element, queries_of_all_sizes, one_token_of_weight, scales_of_all_sizes)
"""Changes of inputs that one unit for a row is hard for."""


def assert_not_finite_stays_in_its_row(module, spec, number, scale=()):
    """A query makes its own row NaN, and a scale of a value all rows of its head, where the token weighs anything.

    scale is where an array of scales has it behind block, slot and head.
    """
    inputs = make_inputs(spec, [40, 700, 129])
    clean, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    inputs.query[1, 1, 5] = number
    out, found = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    row = np.zeros(lse.shape, bool)
    row[1, 1] = True
    assert np.isnan(out[row]).all()
    assert np.isnan(found[row]).all()
    assert_same_bits(out[~row], clean[~row])
    assert_same_bits(found[~row], lse[~row])
    inputs = make_inputs(spec, [40, 700, 129])
    inputs.heads["value_scale"][(inputs.block_table[1, 3], 0, 0, *scale)] = number
    out, found = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    row = np.zeros(lse.shape, bool)
    row[1, : spec.group] = True
    assert np.isnan(out[row]).all()
    assert_same_bits(out[~row], clean[~row])
    assert_same_bits(found, lse)
