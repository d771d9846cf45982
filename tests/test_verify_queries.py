"""Module.verify of attend, attend_shared_prefix and merge_states: what is drawn, and wrong modules fail."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from broken import (
    DRAWS,
    SEED,
    BrokenWithParts,
    BrokenWithPrefixes,
    BrokenWithQueries,
    expect_failures,
    logarithm_to_base_2,
    one_element,
    writes_its_inputs,
)
from specs import BASE

from pa_compiler.key_ranges import attend_range_blocks
from pa_compiler.verification import draws, verify


def test_draws_of_attend_reach_what_is_hard():
    calls = [draws.draw(BASE, SEED, number, True) for number in range(1, 160, 2)]
    assert all(draws.draw(BASE, SEED, number, True).queries is None for number in range(0, 20, 2))
    counts = np.concatenate([call.queries.counts for call in calls])
    assert {0, 1, 2, 7, 16, 17, 33, 512} <= set(counts.tolist())
    assert {call.queries.causal for call in calls} == {False, True}
    trees = [call.queries.tree_mask for call in calls if call.queries.tree_mask is not None]
    assert {tree.dtype.name for tree in trees} == {"bool", "uint8"}
    assert max(call.context_lens.max(initial=0) for call in calls) > attend_range_blocks(BASE) * BASE.block_size
    assert any(np.isnan(call.values[call.is_used].astype(np.float32)).any() for call in calls)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_element, r"^out: 1 of \d+ elements out of tolerance"),
        (logarithm_to_base_2, r"^lse: "),
        (writes_its_inputs, r"^value_cache: its bits are not as expected after attend"),
    ],
    ids=["one_element", "logarithm_to_base_2", "writes_its_inputs"],
)
def test_wrong_results_of_attend_fail(compiled, spoil, message):
    module = BrokenWithQueries(compiled(BASE, attend=True), spoil)
    results = [verify.verify(module, seed=SEED, draw=number) for number in range(DRAWS)]
    assert not any(result.failures for result in results[::2])
    messages = [failure.message for result in results for failure in result.failures]
    assert any(re.search(message, each) for each in messages), messages


@pytest.mark.parametrize("fields", [{}, {"window": 60, "sinks": True}], ids=["all", "window"])
def test_prefixes_and_merges_are_drawn(compiled, fields):
    module = compiled(dataclasses.replace(BASE, **fields), attend=True, shared_prefix=True, merge_states=True)
    for number in range(24):
        assert module.verify(seed=SEED, draw=number).passed


def test_draws_of_prefixes_reach_what_is_hard():
    calls = [draws.draw(BASE, SEED, number, True, True) for number in range(120)]
    told = [(call, call.prefixes) for call in calls if call.prefixes is not None]
    assert len(told) > 20
    assert {call.queries is None for call in calls if call.prefixes is None} == {True, False}
    lens = np.concatenate([prefixes.prefix_len for _, prefixes in told])
    assert lens.max() > 500
    assert 0 in lens
    assert (lens % BASE.block_size == 0).all()
    shared = [
        np.count_nonzero(call.queries.counts[begin:end])
        for call, prefixes in told
        for begin, end, length in zip(
            prefixes.prefix_start_loc[:-1], prefixes.prefix_start_loc[1:], prefixes.prefix_len, strict=True
        )
        if length
    ]
    assert max(shared) > 3
    assert any(call.as_pair for call, _ in told)


def test_wrong_results_of_prefixes_and_parts_fail(compiled):
    module = compiled(BASE, attend=True, shared_prefix=True, merge_states=True)
    expect_failures(BrokenWithPrefixes(module, one_element), "^out: 1 of")
    expect_failures(BrokenWithPrefixes(module, writes_its_inputs), "^value_cache: .* after attend_shared_prefix")
    expect_failures(BrokenWithParts(module), r"^merge_states: (out|lse): .* of \d+ parts: expected")
