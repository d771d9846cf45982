"""attend with a mask_mod, of keys after the query token too: in calls that are not causal, and beside trees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ragged_inputs import assert_near_float64, drawn_trees, make_ragged
from specs import BASE, SPECS
from tolerances import assert_same_bits

MIX = [(1, 1), (0, 9), (2, 2), (7, 100), (1, 300), (16, 129), (33, 128), (1, 7), (17, 255), (3, 3), (9, 700)]


def first_and_near(batch, head, query_pos, key_pos):
    return (key_pos < 4) | (abs(query_pos - key_pos) < 40)


def not_itself(batch, head, query_pos, key_pos):
    return (key_pos != query_pos) & ((head != 1) | (key_pos % 2 == 0))


def after_it(batch, head, query_pos, key_pos):
    return (key_pos > query_pos) & (key_pos // 16 < query_pos // 16 + 3)


CASES = {
    "first_and_near": (BASE, first_and_near, "fused"),
    "first_and_near_packed": (SPECS["bfloat16_packed"], first_and_near, "fused"),
    "first_and_near_staged": (BASE, first_and_near, "staged"),
    "not_itself": (SPECS["bfloat16_HND"], not_itself, "fused"),
    "not_itself_staged_packed": (SPECS["bfloat16_packed"], not_itself, "staged"),
    "after_it": (dataclasses.replace(BASE, window=30), after_it, "fused"),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def module(request, compiled):
    spec, mask, pipeline = request.param
    return compiled(dataclasses.replace(spec, mask_mod=mask), pipeline, attend=True)


def test_results_are_near_float64(module):
    trees = drawn_trees([count for count, _ in MIX], np.random.default_rng(0))
    for options in ({}, {"causal": False}, {"tree_mask": trees}):
        ragged = make_ragged(module.spec, MIX, **options)
        assert_near_float64(module.spec, ragged, *ragged.attend(module))


def test_what_the_mask_hides_is_not_read(module, count):
    """verify's draws have ids that fault in the table, and NaN in the caches, wherever no query token sees."""
    for draw in range(1, count(20, 200), 2):
        result = module.verify(seed=3, draw=draw)
        assert result.passed, result.failures


@pytest.mark.parametrize("case", ["first_and_near", "first_and_near_packed", "first_and_near_staged"])
def test_ids_between_what_is_seen_are_not_looked_at(compiled, case):
    """As decode does it: several query tokens see the first block, and the last ones, each its own."""
    base, mask, pipeline = CASES[case]
    spec = dataclasses.replace(base, mask_mod=mask)
    module, size, causal = compiled(spec, pipeline, attend=True), spec.block_size, {"causal": False}
    ragged = make_ragged(spec, [(30, 900), (1, 900)], **causal)
    expected = ragged.attend(module)
    first = (900 - 30 - 39) // size  # the block of the first key that is near to the first query token
    table = ragged.inputs.block_table.copy()
    table[0, 1:first] = 99_999
    table[1, 1 : (900 - 1 - 39) // size] = -1
    changed = dataclasses.replace(ragged, inputs=ragged.inputs.replace(block_table=table))
    for one, other in zip(changed.attend(module), expected, strict=True):
        assert_same_bits(one, other)
    for position in (0, first):
        broken = table.copy()
        broken[0, position] = 99_999
        changed = dataclasses.replace(ragged, inputs=ragged.inputs.replace(block_table=broken))
        with pytest.raises(IndexError, match=rf"^block_table: .* got 99999 for sequence 0 at position {position}$"):
            changed.attend(module)


def test_a_mask_of_what_comes_before_is_a_causal_call(compiled):
    """Whether the call or the mask says that a query token sees nothing after itself: the same numbers."""
    module = compiled(dataclasses.replace(BASE, mask_mod=lambda b, h, q, k: k <= q), attend=True)
    plain, ragged = compiled(BASE, attend=True), make_ragged(BASE, MIX)
    expected = ragged.attend(plain)
    for options in ({}, {"causal": False}):
        for one, other in zip(ragged.attend(module, **options), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
