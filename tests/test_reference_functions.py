"""reference.decode with score_mod, mask_mod and inputs: Python functions, called with arrays."""

from __future__ import annotations

import numpy as np
import pytest

from pa_compiler import PagedAttentionSpec, reference

RNG = np.random.default_rng(0)
CALL = (
    RNG.standard_normal((2, 4, 8)),
    *RNG.standard_normal((2, 5, 4, 2, 8)),
    np.array([[3, 1, 0], [2, 4, -1]]),
    np.array([11, 6]),
)
SLOPES = np.array([0.5, -0.25, 0.1, 2.0])
SINKS = np.array([0.0, 1.0, -2.0, 3.0])


def assert_same(fields, functions):
    for one, other in zip(
        reference.decode(*CALL, return_lse=True, **fields),
        reference.decode(*CALL, return_lse=True, **functions),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


FUNCTIONS = {
    "window": ({"window": 3}, {"mask_mod": lambda b, h, q, k: q - k < 3}),
    "softcap": ({"softcap": 2.0}, {"score_mod": lambda s, b, h, q, k: 2 * np.tanh(s / 2)}),
    "alibi": (
        {"alibi_slopes": SLOPES},
        {"score_mod": lambda s, b, h, q, k, *, m: s + m[h] * (k - q), "inputs": {"m": SLOPES}},
    ),
    "nothing": ({}, {"score_mod": lambda s, b, h, q, k: s, "mask_mod": lambda b, h, q, k: k >= 0}),
    "all_inputs": ({}, {"score_mod": lambda s, b, h, q, k, **all_of: s + 0 * all_of["m"][h], "inputs": {"m": SLOPES}}),
    "others_are_not_passed": ({}, {"score_mod": lambda s, b, h, q, k: s, "inputs": {"m": SLOPES}}),
    "between_cap_and_bias": (
        {"softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS},
        {"softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS, "score_mod": lambda s, b, h, q, k: np.minimum(s, 2.0)},
    ),
    "a_mask_and_a_window": ({"window": 3}, {"window": 7, "mask_mod": lambda b, h, q, k: q - k < 3}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_do_what_fields_do(name):
    assert_same(*FUNCTIONS[name])


def test_positions_heads_and_sequences():
    """All four arguments tell keys apart: the weight of a key is exp of its score."""
    _, lse = reference.decode(
        *CALL, 0.0, return_lse=True, score_mod=lambda s, b, h, q, k: np.where(k == q, 100 * b + 10 * h + q, -np.inf)
    )
    assert np.allclose(lse, [[10, 20, 30, 40], [105, 115, 125, 135]])


def test_what_a_mask_hides_from_one_head_reaches_no_other_way():
    query, keys, values, table, lens = CALL
    keys, values = keys.copy(), values.copy()
    keys[3, 0], values[3, 1], values[3, 2, :, 0] = np.inf, np.nan, -np.inf  # tokens 0, 1 and 2 of the first sequence

    def mask(batch, head, query_pos, key_pos):
        return (key_pos > 2) | (head == 3) & (batch == 0)

    expected = reference.decode(*CALL, mask_mod=lambda b, h, q, k: k > 2)
    out = reference.decode(query, keys, values, table, lens, mask_mod=mask)
    np.testing.assert_allclose(out[:, :3], expected[:, :3])
    assert np.isnan(out[0, 3]).all()


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
def test_a_row_that_sees_nothing(sinks):
    out, lse = reference.decode(*CALL, return_lse=True, sinks=sinks, mask_mod=lambda b, h, q, k: (h != 1) & (k >= 0))
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == (-np.inf if sinks is None else sinks[1])).all()
    assert (out[:, 0] != 0).all()


def read(s, b, h, q, k, *, m):
    return s + m[k - 2]


def test_an_index_outside_of_an_input_is_nan_where_the_key_is_seen():
    inputs = {"m": np.zeros(4)}
    assert np.isnan(reference.decode(*CALL, score_mod=read, inputs=inputs)).all()
    inside = {"mask_mod": lambda b, h, q, k: (k >= 2) & (k < 6)}
    out = reference.decode(*CALL, score_mod=read, inputs=inputs, **inside)
    np.testing.assert_allclose(out, reference.decode(*CALL, **inside))
    reading = {"mask_mod": lambda b, h, q, k, *, m: (m[k - 2] == 0) & (k > 1), "inputs": inputs}
    assert np.isnan(reference.decode(*CALL, **reading)[0]).all()  # its tokens 6 to 10 are seen by an index outside
    assert not np.isnan(reference.decode(*CALL, **reading)[1]).any()


def test_functions_of_torch_get_tensors():
    torch = pytest.importorskip("torch")
    table = torch.tensor(SLOPES, dtype=torch.float32)

    def score_mod(score, batch, head, query_pos, key_pos, *, bias):
        return torch.where(key_pos > 3, torch.tanh(score), score) + table[head] + bias[head]

    inputs = {"bias": SINKS.astype(np.float32)}
    spec = PagedAttentionSpec(4, 2, 8, 4, "float32", score_mod=score_mod, inputs={"bias": ("float32", (4,))})
    expected = reference.decode(
        *CALL, score_mod=lambda s, b, h, q, k: np.where(k > 3, np.tanh(s), s) + np.float32(SLOPES)[h] + SINKS[h]
    )
    np.testing.assert_allclose(reference.decode(*CALL, score_mod=spec.score_mod, inputs=inputs), expected)
