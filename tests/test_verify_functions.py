"""verify() with score_mod and mask_mod: bounds that float32 keeps, and slips that they do not hide."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from pa_compiler import PagedAttentionSpec
from pa_compiler.verification import draws, verify
from pa_compiler.verification.inputs import constant_arrays
from pa_compiler.verification.intervals import error_bound

BASE = PagedAttentionSpec(6, 2, 24, 8, "float32")
BIAS = {"bias": ("float32", (6, 300))}


def relative(score, batch, head, query_pos, key_pos, *, bias):
    return score + bias[head, np.minimum(query_pos - key_pos, 299)]


def prefix_or_recent(batch, head, query_pos, key_pos):
    return (key_pos < 4) | (query_pos - key_pos < 40)


SCORE_MODS = {
    "same": lambda s, b, h, q, k: s,
    "twice": lambda s, b, h, q, k: s * 2,
    "square": lambda s, b, h, q, k: s * s - 3 * s,
    "tanh": lambda s, b, h, q, k: 5 * np.tanh(s / 5),
    "decay": lambda s, b, h, q, k: s - np.log(1.0 + (q - k)) * 0.37,
    "exp": lambda s, b, h, q, k: np.exp(s) / (1.0 + np.exp(s)),
    "sqrt": lambda s, b, h, q, k: np.sqrt(np.abs(s) + 0.1),
    "leaky": lambda s, b, h, q, k: np.where(s > 0.3, s, s * 0.1),
    "jump": lambda s, b, h, q, k: np.where(s > 0.3, s, -1.0),
    "floor": lambda s, b, h, q, k: np.floor(s * 4) / 4,
    "remainder": lambda s, b, h, q, k: s % 0.7,
    "steps": lambda s, b, h, q, k: s - ((q - k) // 16) * 0.3 + (k % 3) * (h + 1) * 0.01,
    "casts": lambda s, b, h, q, k: np.maximum(s, (k % 2 == 0) * 0.5) + np.minimum(s, h * 0.1),
}


def spec_of(score_mod):
    return dataclasses.replace(BASE, score_mod=score_mod)


@pytest.mark.parametrize("name", SCORE_MODS)
def test_float32_stays_within_the_intervals(name):
    """The function is called with float32 scores that are off by up to what is allowed, and rounded once more."""
    rng = np.random.default_rng(0)
    spec = spec_of(SCORE_MODS[name])
    scores = rng.standard_normal((6, 500)) * 2
    places = {
        "batch": np.array(1),
        "head": np.arange(6)[:, None],
        "query_pos": np.array(499),
        "key_pos": np.arange(500),
    }
    of_score = 1e-6 * np.abs(scores)
    moved = np.float32(scores + of_score * rng.uniform(-0.9, 0.9, scores.shape))
    exact = SCORE_MODS[name](scores, *places.values())
    bound = error_bound(spec.score_mod.result, exact, places | {"score": scores}, of_score, constant_arrays(spec))
    error = np.abs(SCORE_MODS[name](moved, *places.values()).astype(np.float32) - exact)
    assert (error <= bound).all()
    assert np.median(bound) < 1e-4


def test_a_function_of_another_kind_is_not_within_them():
    spec = spec_of(SCORE_MODS["twice"])
    scores = np.linspace(0.5, 2, 9)
    arguments = {"score": scores, "batch": 0, "head": 0, "query_pos": 8, "key_pos": np.arange(9)}
    bound = error_bound(spec.score_mod.result, scores * 2.001, arguments, np.zeros(9), {})
    assert (bound < 1e-6).all()


CASES = {
    "relative": {"score_mod": relative, "inputs": BIAS},
    "prefix": {"mask_mod": prefix_or_recent},
    "by_heads": {"mask_mod": lambda b, h, q, k: (h + k) % 2 == 0},
    "switched": {"mask_mod": lambda b, h, q, k, *, on: on[b, h], "inputs": {"on": ("bool", ("batch", 6))}},
    "all": {
        "window": 100,
        "softcap": 5.0,
        "alibi": True,
        "sinks": True,
        "score_mod": relative,
        "mask_mod": prefix_or_recent,
        "inputs": BIAS,
    },
}


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
@pytest.mark.parametrize("name", CASES)
def test_modules_with_functions_pass(compiled, name, pipeline):
    found = compiled(dataclasses.replace(BASE, **CASES[name]), pipeline).verify(0.5, seed=4)
    assert found.passed, found.failures


def test_draws_poison_what_a_mask_hides():
    spec = dataclasses.replace(BASE, **CASES["prefix"])
    hidden = 0
    for number in range(16):
        call, unmasked = draws.draw(spec, 5, number), draws.draw(BASE, 5, number)
        assert (call.context_lens == unmasked.context_lens).all()
        assert call.is_used.sum() <= unmasked.is_used.sum()  # in a cache that may have fewer blocks
        assert not np.isfinite(call.keys[~call.is_used].astype(np.float32)).any()
        hidden += int(unmasked.is_used.sum() - call.is_used.sum())
    assert hidden > 100


SLIPS = {
    "index": ("relative", {"score_mod": lambda s, b, h, q, k, *, bias: s + bias[h, np.minimum(q - k + 1, 299)]}),
    "head": ("relative", {"score_mod": lambda s, b, h, q, k, *, bias: s + bias[5 - h, np.minimum(q - k, 299)]}),
    "sign": ("relative", {"score_mod": lambda s, b, h, q, k, *, bias: s - bias[h, np.minimum(q - k, 299)]}),
    "a_thousandth": (
        "relative",
        {"score_mod": lambda s, b, h, q, k, *, bias: s + bias[h, np.minimum(q - k, 299)] * 1.001},
    ),
    "a_key_less": ("prefix", {"mask_mod": lambda b, h, q, k: (k < 4) | (q - k < 39)}),
    "a_key_more": ("prefix", {"mask_mod": lambda b, h, q, k: (k < 5) | (q - k < 40)}),
    "parity": ("by_heads", {"mask_mod": lambda b, h, q, k: (h + k) % 2 == 1}),
    "another_sequence": ("switched", {"mask_mod": lambda b, h, q, k, *, on: on[np.maximum(b - 1, 0), h]}),
}


@pytest.mark.parametrize("name", SLIPS)
def test_slips_are_failures(compiled, name):
    """A module is held against a spec from which its own differs by a slip."""
    case, slip = SLIPS[name]
    spec = dataclasses.replace(BASE, **CASES[case])
    module = copy.copy(compiled(spec))
    module.spec = dataclasses.replace(spec, **slip)
    assert not verify.verify(module, 2, seed=6).passed


def test_reads_outside_of_an_input_are_nan_in_both(compiled):
    spec = dataclasses.replace(
        BASE, score_mod=lambda s, b, h, q, k, *, bias: s + bias[h, q - k], inputs={"bias": ("float32", (6, 50))}
    )
    assert compiled(spec).verify(1, seed=7).passed
