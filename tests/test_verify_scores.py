"""verify() with windows, soft caps, ALiBi and sinks, by NumPy: float32 stays within the bounds, slips do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pa_compiler import PagedAttentionSpec, reference_weights
from pa_compiler.verification import draws, verify
from pa_compiler.verification.inputs import needed_entries
from pa_compiler.verification.tolerances import of_weights, score_bound

BASE = PagedAttentionSpec(6, 2, 24, 5, "float32")
SPECS = {
    "window": dataclasses.replace(BASE, window=100),
    "window_1": dataclasses.replace(BASE, window=1),
    "window_alone_in_bfloat16": PagedAttentionSpec(4, 1, 16, 8, "bfloat16", "float16", kv_layout="HND", window=129),
    "softcap": dataclasses.replace(BASE, softcap=30.0),
    "softcap_below_the_scores": dataclasses.replace(BASE, softcap=0.5),
    "alibi": dataclasses.replace(BASE, alibi=True),
    "alibi_one_head_of_values": dataclasses.replace(BASE, alibi=True, value_dim=1),
    "sinks": dataclasses.replace(BASE, sinks=True),
    "sinks_to_float16": PagedAttentionSpec(8, 2, 16, 16, "float16", sinks=True),
    "all": dataclasses.replace(BASE, window=100, softcap=5.0, alibi=True, sinks=True),
    "all_in_one_cache": PagedAttentionSpec(
        8, 1, 24, 16, "bfloat16", value_dim=16, shared_kv=True, window=33, softcap=50.0, alibi=True, sinks=True
    ),
}
SEED, DRAWS = 3, 32


class InFloat32:
    """A module whose scores go through float32, one operation after another, and whose sums are exact.

    The arguments are slips: tokens that the window is too long by, heads by which slopes are off, and the functions
    that are left out.
    """

    has_attend = has_attend_shared_prefix = has_merge_states = False
    most_query_tokens = None

    def __init__(self, spec, more=0, roll=0, without=()):
        self.spec, self.num_threads = spec, 1
        self.more, self.roll, self.without = more, roll, without

    def scores(self, query, keys, scale, slopes):
        spec = self.spec
        with np.errstate(over="ignore", under="ignore"):
            exact = (spec.head_dim**-0.5 if scale is None else scale) * (query.astype(np.float64) @ keys)
            scores = exact.astype(np.float32)
            if spec.softcap is not None and "softcap" not in self.without:
                cap = np.float32(spec.softcap)
                scores = cap * np.tanh(scores / cap)
            if slopes is not None and "alibi" not in self.without:
                distance = np.arange(1 - keys.shape[1], 1, dtype=np.float32)
                scores = scores + np.roll(slopes, self.roll)[:, None] * distance
        assert scores.dtype == np.float32
        return scores

    def one(self, query, key_cache, value_cache, blocks, length, scale, slopes, sinks):
        """out and lse of a sequence."""
        spec = self.spec
        window = length if spec.window is None else spec.window + self.more
        position = np.arange(max(0, length - window), length)
        keys, values = reference_weights.gathered(key_cache, value_cache, blocks, position, spec.kv_layout)
        rows = []
        for head in range(spec.num_heads):
            scores = self.scores(query, keys[head // spec.group], scale, slopes)[head].astype(np.float64)
            sink = -np.inf if sinks is None or "sinks" in self.without else float(sinks[head])
            peak = max(scores.max(initial=-np.inf), sink)
            weights, of_sink = (np.exp(each - (0 if peak == -np.inf else peak)) for each in (scores, sink))
            total = weights.sum() + of_sink or 1.0
            rows.append((weights / total @ values[head // spec.group], peak + np.log(total)))
        return [np.array(each) for each in zip(*rows, strict=True)]

    def decode(
        self, query, keys, values, table, lens, scale=None, out=None, *,
        lse=None, return_lse=False, alibi_slopes=None, sinks=None,
    ):  # fmt: skip
        spec = self.spec
        assert (alibi_slopes is not None, sinks is not None) == (spec.alibi, spec.sinks)
        values = keys[..., : spec.result_dim] if values is None else values
        out = np.empty((*query.shape[:2], spec.result_dim), spec.result_dtype) if out is None else out
        lse = np.empty(query.shape[:2], np.float32) if lse is None else lse
        for i, length in enumerate(lens.tolist()):
            out[i], lse[i] = 0, -np.inf if sinks is None or "sinks" in self.without else sinks
            if length:
                blocks = table[1][table[0][i] : table[0][i + 1]] if isinstance(table, tuple) else table[i]
                one = (query[i], keys, values, blocks, length, scale, alibi_slopes, sinks)
                out[i], lse[i] = self.one(*one)
        return (out, lse) if return_lse else out

    def append_kv(self, key, value, key_cache, value_cache, slots):
        for new, cache in ((key, key_cache), (value, value_cache)):
            if new is not None:
                by_slot = cache if self.spec.kv_layout == "NHD" else cache.swapaxes(1, 2)
                block, slot = np.divmod(slots[slots >= 0], self.spec.block_size)
                by_slot[block, slot] = new[slots >= 0]


def failures(module):
    return [failure for number in range(DRAWS) for failure in verify.verify(module, seed=SEED, draw=number).failures]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_scores_in_float32_pass(spec):
    assert not failures(InFloat32(spec))


@pytest.mark.parametrize(
    ("name", "slip"),
    [
        ("window", {"more": -1}),
        ("window_alone_in_bfloat16", {"more": -1}),
        ("softcap", {"without": ["softcap"]}),
        ("alibi", {"without": ["alibi"]}),
        ("alibi", {"roll": 1}),
        ("sinks", {"without": ["sinks"]}),
        ("sinks_to_float16", {"without": ["sinks"]}),
        ("all", {"more": -1}),
        ("all", {"roll": 1}),
        ("all_in_one_cache", {"without": ["sinks"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, [*value, *value.values()])),
)
def test_slips_fail(name, slip):
    assert failures(InFloat32(SPECS[name], **slip))


def test_a_token_before_the_window_is_poison():
    """In every draw whose sequences are longer: keys and values that are not finite, and ids that are none."""
    spec, found = SPECS["window"], 0
    for number in range(DRAWS):
        call = draws.draw(spec, SEED, number)
        seen = needed_entries(spec, call.context_lens, call.block_table.shape[1])
        before = ~seen & (np.arange(seen.shape[1]) < (call.context_lens // spec.block_size)[:, None])
        ids = call.block_table[before]
        assert not ((ids >= 0) & (ids < len(call.keys))).any()
        found += len(ids)
        assert call.is_used.sum() <= np.minimum(call.context_lens, spec.window).sum()
        assert not np.isfinite(call.keys[~call.is_used]).any()
    assert found > 100


def test_draws_reach_what_is_hard():
    calls = [draws.draw(SPECS["all"], SEED, number) for number in range(DRAWS)]
    lens = np.concatenate([call.context_lens for call in calls])
    assert {99, 100, 101} & set(lens.tolist())
    sinks, slopes = (np.concatenate([call.heads[name] for call in calls]) for name in ("sinks", "alibi_slopes"))
    assert {0.0, -np.inf} <= set(sinks.tolist())
    assert sinks[np.isfinite(sinks)].min() < -1e29
    assert sinks.max() > 1e29
    assert (slopes < 0).any()
    assert (slopes == 0).any()
    assert (slopes > 0.5).any()


def test_draws_without_score_functions_have_no_arrays_of_them():
    assert draws.draw(BASE, SEED, 0).heads == {}


def test_what_float32_has_exactly_has_no_error():
    """Whole numbers are summed exactly; a slope of 0.1 is not one, nor is a capped score."""
    spec = dataclasses.replace(BASE, alibi=True)
    scores = np.array([[[3.0, 4.0, 2.0**30]]])
    assert not score_bound(spec, scores, np.array([[[-2.0, -1.0, 0.0]]])).any()
    rounded = score_bound(spec, scores, np.array([[[-0.1, 1 / 3, 0.0]]]))
    np.testing.assert_allclose(rounded, [[[0.1 * 2**-24, 2**-24 / 3, 0]]])
    assert not score_bound(BASE, scores, None).any()
    capped = score_bound(dataclasses.replace(BASE, softcap=5.0), np.array([[[5.0]]]), None)
    np.testing.assert_allclose(capped, [[[5 * (4 * 2.0**-24 + 5e-7)]]])


def test_an_error_of_scores_is_one_of_out_by_its_weight():
    """Two tokens of weight 1/4 and 3/4, whose scores are off by 1e-3 and 2e-3 in either direction: never more."""
    spec = PagedAttentionSpec(1, 1, 4, 1, "float32", value_dim=1)
    values, weights, off = np.array([[[8.0], [-4.0]]]), np.array([[[0.25, 0.75]]]), np.array([[[1e-3, 2e-3]]])
    of_out, of_lse = of_weights(spec, weights, values, off)
    for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
        moved = weights * np.exp(signs * off)
        out = (moved / moved.sum() @ values).item()
        assert abs(out - -1) <= of_out.item() * 1.01
        assert abs(np.log(moved.sum())) <= of_lse.item() * 1.01


def test_weights_far_below_a_sink_may_be_lost():
    spec = PagedAttentionSpec(1, 1, 4, 1, "float32", value_dim=1, sinks=True)
    weights, values = np.array([[[1e-30, 1e-20]]]), np.array([[[1e6], [1e6]]])
    of_out, _ = of_weights(spec, weights, values, np.zeros((1, 1, 2)))
    assert of_out.item() == pytest.approx(1e-24)
