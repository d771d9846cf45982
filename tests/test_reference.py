"""The oracle itself, against loops simple enough to be seen to be right."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from inputs import Inputs, make_inputs

from pa_compiler import PagedAttentionSpec, reference


def values_of(inputs, spec):
    """value_cache, or the view of key_cache that the values are."""
    return inputs.key_cache[..., : spec.result_dim] if spec.shared_kv else inputs.value_cache


def read(inputs, spec, name, sequence, token, kv_head):
    """The key or the value of one token and head, [head_dim] or [value_dim]."""
    cache = values_of(inputs, spec) if name == "value_cache" else inputs.key_cache
    block, slot = inputs.block_table[sequence, token // spec.block_size], token % spec.block_size
    if spec.kv_layout == "NHD":
        return cache[block, slot, kv_head]
    if spec.kv_layout == "HND":
        return cache[block, kv_head, slot]
    if spec.dtype == "bfloat16" and name == "key_cache":
        return cache[block, kv_head, :, 2 * slot : 2 * slot + 2].reshape(-1)
    if spec.dtype == "bfloat16":
        return cache[block, kv_head, slot // 2, slot % 2 :: 2]
    return cache[block, kv_head, :, slot] if name == "key_cache" else cache[block, kv_head, slot]


def attention_by_loops(inputs: Inputs, spec: PagedAttentionSpec, scale: float):
    """One token, one head, one element at a time, with the spec's score functions."""
    out = np.zeros((*inputs.query.shape[:2], spec.result_dim))
    lse = np.full(inputs.query.shape[:2], -math.inf)
    for sequence, length in enumerate(inputs.context_lens):
        for head in range(spec.num_heads):
            kv_head, query = head // spec.group, inputs.query[sequence, head]
            scores = {}
            for token in range(length):
                distance = length - 1 - token
                if spec.window is not None and distance >= spec.window:
                    continue
                key = read(inputs, spec, "key_cache", sequence, token, kv_head)
                score = scale * sum(float(q) * float(k) for q, k in zip(query, key, strict=True))
                if spec.softcap is not None:
                    score = spec.softcap * math.tanh(score / spec.softcap)
                if spec.alibi:
                    score -= float(inputs.heads["alibi_slopes"][head]) * distance
                scores[token] = score
            sink = math.exp(inputs.heads["sinks"][head]) if spec.sinks else 0
            denominator = sink + sum(math.exp(score) for score in scores.values())
            for token, score in scores.items():
                value = read(inputs, spec, "value_cache", sequence, token, kv_head)
                out[sequence, head] += math.exp(score) / denominator * value.astype(np.float64)
            if denominator:
                lse[sequence, head] = math.log(denominator)
    return out, lse


SPECS = {
    "one_head": PagedAttentionSpec(1, 1, 3, 2, "float32"),
    "groups_of_3": PagedAttentionSpec(6, 2, 4, 3, "float16"),
    "own_kv_head_each": PagedAttentionSpec(3, 3, 5, 1, "bfloat16"),
    "HND": PagedAttentionSpec(4, 2, 4, 3, "float32", kv_layout="HND"),
    "packed_float32": PagedAttentionSpec(4, 2, 5, 16, "float32", kv_layout="packed"),
    "packed_float16": PagedAttentionSpec(2, 1, 4, 48, "float16", kv_layout="packed"),
    "packed_bfloat16": PagedAttentionSpec(6, 2, 6, 16, "bfloat16", kv_layout="packed"),
    "small_values": PagedAttentionSpec(6, 2, 5, 3, "float32", value_dim=2),
    "large_values": PagedAttentionSpec(4, 2, 6, 16, "bfloat16", kv_layout="packed", value_dim=9),
    "shared": PagedAttentionSpec(4, 1, 6, 3, "float16", value_dim=4, shared_kv=True),
    "shared_HND": PagedAttentionSpec(4, 2, 4, 3, "bfloat16", kv_layout="HND", shared_kv=True),
}


@pytest.mark.parametrize("scale", [None, 1.0, -0.5, 0.0])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_loops(spec, scale):
    inputs = make_inputs(spec, [0, 1, spec.block_size, 2 * spec.block_size + 1, 0])
    expected = attention_by_loops(inputs, spec, 1 / math.sqrt(spec.head_dim) if scale is None else scale)
    arguments = inputs.replace(value_cache=values_of(inputs, spec)).arguments
    actual = reference.decode(*arguments, scale, kv_layout=spec.kv_layout, return_lse=True)
    assert actual[0].dtype == actual[1].dtype == np.float64
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-12, atol=1e-14)


SCORES = {
    "window": {"window": 2},
    "window_of_1": {"window": 1},
    "window_larger": {"window": 1000},
    "softcap": {"softcap": 0.05},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 0.05, "alibi": True, "sinks": True},
}


def keywords(spec, inputs):
    return {"kv_layout": spec.kv_layout, "window": spec.window, "softcap": spec.softcap} | inputs.heads


@pytest.mark.parametrize("fields", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("name", SPECS)
def test_score_functions_equal_loops(name, fields):
    """NaN, and block ids that are none, before a window are not read."""
    spec = dataclasses.replace(SPECS[name], **fields)
    inputs = make_inputs(spec, [0, 1, spec.block_size, 2 * spec.block_size + 1, 0, 3])
    expected = attention_by_loops(inputs, spec, 2.0)
    arguments = inputs.replace(value_cache=values_of(inputs, spec)).arguments
    actual = reference.decode(*arguments, 2.0, return_lse=True, **keywords(spec, inputs))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-12, atol=1e-14)


def decode_by_hand(scores, values, **keywords):
    """out and lse of one head of 1, whose query is 1 and whose keys are the scores."""
    keys, values = (np.array(each, np.float64).reshape(1, -1, 1, 1) for each in (scores, values))
    table, lens = np.zeros((1, 1), np.int32), np.array([keys.shape[1]])
    out, lse = reference.decode(np.ones((1, 1, 1)), keys, values, table, lens, 1.0, return_lse=True, **keywords)
    return float(out[0, 0, 0]), float(lse[0, 0])


def test_by_hand():
    """Weights that are small whole numbers: exp(log(n)) is n."""
    log = math.log
    scores, values = [log(5), log(1), log(2), log(1)], [100, 8, 4, 12]
    exact = {"rel": 1e-14}
    assert decode_by_hand(scores, values, window=3) == pytest.approx(((8 + 8 + 12) / 4, log(4)), **exact)
    assert decode_by_hand(scores, values, window=1) == pytest.approx((12, 0), **exact)
    sinks = np.array([log(4)])
    assert decode_by_hand(scores, values, window=3, sinks=sinks) == pytest.approx((28 / 8, log(8)), **exact)
    assert decode_by_hand(scores, values, window=3, sinks=np.zeros(1)) == pytest.approx((28 / 5, log(5)), **exact)
    slopes = np.array([log(2)])  # a weight halves with each token of distance: 5/8, 1/4, 1, 1
    assert decode_by_hand(scores, values, alibi_slopes=slopes) == pytest.approx(
        ((62.5 + 2 + 4 + 12) / 2.875, log(2.875)), **exact
    )
    cap = log(3)  # of which tanh(score / cap) is 0.8 = tanh(log(3)) for a score of cap * log(3)
    assert decode_by_hand([cap * log(3), 0], [1, 0], softcap=cap) == pytest.approx(
        (3**0.8 / (3**0.8 + 1), log(3**0.8 + 1)), **exact
    )


def test_order_of_score_functions():
    """The scale, the cap, ALiBi, and then the sink, which none of them changes."""
    keywords = {"softcap": 2.0, "alibi_slopes": np.array([0.5]), "sinks": np.array([1.5])}
    keys = np.array([8.0, -1e300]).reshape(1, 2, 1, 1)
    _, lse = reference.decode(
        np.ones((1, 1, 1)), keys, keys, np.zeros((1, 1), int), np.array([2]), 0.25, return_lse=True, **keywords
    )
    first, last = 2 * math.tanh(0.25 * 8 / 2) - 0.5, -2
    assert lse[0, 0] == pytest.approx(math.log(math.exp(first) + math.exp(last) + math.exp(1.5)))


def test_a_row_that_sees_nothing():
    sinks = np.array([0.0, 3.0, -np.inf])
    spec = PagedAttentionSpec(3, 1, 4, 2, "float32")
    inputs = make_inputs(spec, [0, 3])
    inputs.key_cache[...], inputs.query[...] = -np.inf, 1
    out, lse = reference.decode(*inputs.arguments, return_lse=True, sinks=sinks)
    assert not out.any()
    np.testing.assert_array_equal(lse, [sinks, sinks])


def test_a_sink_far_above_the_scores_takes_all_weight():
    out, lse = decode_by_hand([0, 1], [5, 7], sinks=np.array([1e30]))
    assert (out, lse) == (0, 1e30)
    assert decode_by_hand([0, 1], [5, 7], sinks=np.array([-1e30])) == decode_by_hand([0, 1], [5, 7])
    assert decode_by_hand([0, 1], [5, 7], sinks=np.array([-np.inf])) == decode_by_hand([0, 1], [5, 7])


def test_empty_sequences_are_zero():
    spec = SPECS["groups_of_3"]
    out, lse = reference.decode(*make_inputs(spec, [0, 0]).arguments, return_lse=True)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_scores_of_minus_infinity_weigh_nothing():
    """A head of nothing else is as in an empty sequence, beside others that are not."""
    spec = SPECS["groups_of_3"]
    inputs = make_inputs(spec, [4, 7])
    inputs.query[...] = np.abs(inputs.query) + 1
    inputs.key_cache[inputs.block_table[0, :2], :, 0] = -np.inf
    inputs.key_cache[inputs.block_table[1, :2], :, 0] = -np.inf
    out, lse = reference.decode(*inputs.arguments, return_lse=True)
    assert not out[0, :3].any()
    assert np.isneginf(lse[0, :3]).all()
    last = inputs.take([1]).replace(block_table=inputs.block_table[1:, 2:], context_lens=np.array([1]))
    expected = reference.decode(*last.arguments, return_lse=True)
    np.testing.assert_array_equal(out[1, :3], expected[0][0, :3])
    np.testing.assert_array_equal(lse[1, :3], expected[1][0, :3])
    assert np.isfinite(lse[:, 3:]).all()


def test_an_average_is_no_sum():
    spec = SPECS["one_head"]
    inputs = make_inputs(spec, [5])
    values = np.full(inputs.value_cache.shape, 1e308)
    np.testing.assert_allclose(reference.decode(*inputs.replace(value_cache=values).arguments), 1e308)


def test_no_sequences():
    spec = SPECS["one_head"]
    assert reference.decode(*make_inputs(spec, []).arguments).shape == (0, 1, 3)


def test_scores_far_from_zero_do_not_overflow():
    spec = SPECS["one_head"]
    inputs = make_inputs(spec, [5])
    out = reference.decode(*inputs.arguments, 1e30)
    best = np.argmax(inputs.key_cache[inputs.block_table[0, :3]].reshape(-1, 3)[:5] @ inputs.query[0, 0])
    np.testing.assert_array_equal(out[0, 0], inputs.value_cache[inputs.block_table[0, best // 2], best % 2, 0])


def test_unknown_layout_is_refused():
    inputs = make_inputs(SPECS["one_head"], [1])
    with pytest.raises(ValueError, match=r"kv_layout.*NHD.*DHN"):
        reference.decode(*inputs.arguments, kv_layout="DHN")
