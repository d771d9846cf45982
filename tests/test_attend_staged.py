"""attend of the staged pipeline: a second opinion, of query tokens that are places of a chunk."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ragged_inputs import assert_near_float64, drawn_trees, make_ragged
from specs import BASE, SPECS
from tolerances import assert_same_bits

from pa_compiler import AttendItem

every_layout = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
MIX = [(1, 1), (0, 9), (2, 2), (7, 40), (1, 130), (16, 129), (33, 128), (1, 7), (17, 50), (3, 3)]
"""(query tokens, context): single tokens beside others, more tokens than places of a chunk, contexts around blocks."""


def check(module, sequences, **options):
    ragged = make_ragged(module.spec, sequences, **options)
    out, lse = ragged.attend(module)
    assert_near_float64(module.spec, ragged, out, lse)
    return ragged, out, lse


@every_layout
def test_results_are_near_float64(compiled, spec):
    """Whatever the call is told, with poison in what no token has; and decode's bits for single query tokens."""
    module = compiled(spec, "staged", attend=True)
    trees = drawn_trees([count for count, _ in MIX], np.random.default_rng(0))
    for poison, options in (("nan", {}), ("inf", {"causal": False}), ("huge", {"tree_mask": trees})):
        check(module, MIX, poison=poison, **options)
    ragged, out, lse = check(module, MIX, seed=1)
    for sequence in np.flatnonzero(np.array(ragged.counts) == 1):
        token, inputs = ragged.query_start_loc[sequence], ragged.inputs.take([sequence])
        alone = module.decode(ragged.query[[token]], *inputs.arguments[1:], return_lse=True)
        assert_same_bits(out[[token]], alone[0])
        assert_same_bits(lse[[token]], alone[1])


@every_layout
def test_the_same_bits(compiled, spec):
    """Alone, in chunks of a prompt, and with any number of threads."""
    module = compiled(spec, "staged", attend=True)
    ragged = make_ragged(spec, [(60, 97)])
    module.num_threads = 1
    expected = ragged.attend(module)
    for threads in (2, 8):
        module.num_threads = threads
        for one, other in zip(ragged.attend(module), expected, strict=True):
            assert_same_bits(one, other)
    for first, count in ((0, 2), (2, 31), (33, 27)):
        for one, whole in zip(ragged.chunk(first, count).attend(module), expected, strict=True):
            assert_same_bits(one, whole[first : first + count])
    batch = make_ragged(spec, [*MIX, (20, 70)])
    out, lse = batch.attend(module)
    for sequence in (4, 6, 10):
        begin, end = batch.query_start_loc[sequence : sequence + 2]
        alone = batch.take([sequence]).attend(module)
        assert_same_bits(alone[0], out[begin:end])
        assert_same_bits(alone[1], lse[begin:end])


def bias(score, batch, head, query_pos, key_pos, *, table):
    return score + (key_pos - query_pos) * 0.01 * head + table[batch]


@pytest.mark.parametrize("name", ["float32", "bfloat16_packed"])
def test_windows_and_score_functions(compiled, name):
    """All of them together, with an input that is asked for by the number of the sequence."""
    fields = {"window": 20, "softcap": 5.0, "alibi": True, "sinks": True}
    functions = {"score_mod": bias, "inputs": {"table": ("float32", ("batch",))}}
    module = compiled(dataclasses.replace(SPECS[name], **fields, **functions), "staged", attend=True)
    table = np.linspace(-1, 1, len(MIX)).astype(np.float32)
    trees = drawn_trees([count for count, _ in MIX], np.random.default_rng(1))
    for options in ({}, {"causal": False}, {"tree_mask": trees}):
        ragged = make_ragged(module.spec, MIX, **options)
        heads = {**ragged.inputs.heads, "inputs": {"table": table}}
        ragged = dataclasses.replace(ragged, inputs=ragged.inputs.replace(heads=heads))
        assert_near_float64(module.spec, ragged, *ragged.attend(module))


def test_drawn_calls(compiled):
    """As verify makes them: garbage in tables, NaN wherever no query token sees, arrays within others."""
    for spec in (BASE, SPECS["bfloat16_packed"]):
        module = compiled(spec, "staged", attend=True)
        for draw in (1, 3, 5, 9):
            result = module.verify(seed=0, draw=draw)
            assert result.passed, result.failures


def test_the_plan_has_the_places_of_chunks(compiled):
    """Items of as many query tokens as a chunk has places, at most, over all that these see."""
    module = compiled(BASE, "staged", attend=True)
    items = module.plan(np.array([40, 5, 100]), np.array([0, 33, 34, 36]))
    tokens = [item for item in items if isinstance(item, AttendItem)]
    assert max(item.num_query for item in tokens) <= BASE.batch_chunk
    assert sum(item.num_query * item.num_kv_heads for item in tokens) == 35 * BASE.num_kv_heads
    assert all(item.block_end == -(-(item.first_pos + item.num_query) // BASE.block_size) for item in tokens)
