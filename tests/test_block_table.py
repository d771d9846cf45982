"""block_table at random: what is surplus may hold anything, what is used and out of range always raises."""

from __future__ import annotations

import re

import numpy as np
import pytest
from inputs import INT32, make_inputs
from specs import every_spec
from tolerances import assert_same_bits

OUTSIDE = (-1, INT32.min, INT32.max, INT32.min + 1, 1 << 30, -(1 << 16))
"""Ids that no cache has. num_blocks, the first id past the end, and others near it are drawn for each cache."""


def draw_inputs(spec, rng):
    """Up to 20 sequences of 0 to 3 blocks; one in four has many, which is cut into ranges."""
    lengths = rng.integers(0, 3 * spec.block_size + 1, rng.integers(1, 21))
    if rng.random() < 0.25:
        lengths[rng.integers(len(lengths))] = rng.integers(2000, 4000)
    return make_inputs(spec, lengths, seed=int(rng.integers(1 << 30)), surplus=int(rng.integers(0, 5)))


@every_spec
@pytest.mark.scorecard(14)
def test_surplus_entries_hold_anything(compiled, spec, pipeline, count, figure):
    """Any 32 bits, ids of used blocks among them, in a table of any width and stride: the same bits as zeros there."""
    module, rng, cases = compiled(spec, pipeline), np.random.default_rng(14), count(10, 100)
    for _ in range(cases):
        inputs = draw_inputs(spec, rng)
        needed = -(-inputs.context_lens // spec.block_size)
        is_used = np.arange(inputs.block_table.shape[1]) < needed[:, None]
        zeros = inputs.replace(block_table=np.where(is_used, inputs.block_table, 0).astype(np.int32))
        expected = module.decode(*zeros.arguments)
        wide = rng.integers(INT32.min, INT32.max, (len(needed), is_used.shape[1] + 9), np.int32, endpoint=True)
        wide[rng.random(wide.shape) < 0.3] = rng.integers(len(inputs.key_cache))
        wide[:, : is_used.shape[1]][is_used] = inputs.block_table[is_used]
        out = inputs.out
        module.decode(*inputs.replace(block_table=wide).arguments, out=out)
        assert_same_bits(out, expected)
    figure("surplus", cases)


@every_spec
@pytest.mark.scorecard(14)
def test_used_entries_out_of_range_raise(compiled, spec, pipeline, count, figure):
    """At any place, the first such place is named, and out and lse stay as they were."""
    module, rng, cases = compiled(spec, pipeline), np.random.default_rng(41), count(10, 100)
    for _ in range(cases):
        inputs = draw_inputs(spec, rng)
        needed = -(-inputs.context_lens // spec.block_size)
        used = np.argwhere(np.arange(inputs.block_table.shape[1]) < needed[:, None])
        if len(used) == 0:
            continue
        num_blocks = len(inputs.key_cache)
        places = used[np.sort(rng.choice(len(used), min(len(used), rng.integers(1, 4)), replace=False))]
        near = num_blocks + rng.integers(0, 3)
        inputs.block_table[tuple(places.T)] = rng.choice(np.array([*OUTSIDE, num_blocks, near]), len(places))
        (sequence, position), out, lse = places[0], inputs.out, inputs.lse
        says = (
            f"block_table: expected a block id in [0, {num_blocks}), got {inputs.block_table[sequence, position]} "
            f"for sequence {sequence} at position {position}"
        )
        with pytest.raises(IndexError, match=f"^{re.escape(says)}$"):
            module.decode(*inputs.arguments, out=out, lse=lse)
        assert_same_bits(out, inputs.out)
        assert_same_bits(lse, inputs.lse)
        figure("used out of range", 1)
