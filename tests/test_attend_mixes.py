"""attend in every mix of query tokens: each sequence beside float64 by itself, and the same bits beside any others."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from drawn_specs import drawn_spec
from fences import SIDES, fenced, run_in_child
from ragged_inputs import assert_near_float64, drawn_trees, make_ragged
from specs import BASE, SPECS
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.key_ranges import attend_range_blocks

COUNTS = (0, 1, 2, 7, 16, 33, 512)


def contexts(spec, count, number):
    """A context for so many query tokens at an end of a block, of a tile or of a range of keys."""
    ends = (spec.block_size, 16, 128, 256, 2 * spec.block_size, attend_range_blocks(spec) * spec.block_size)
    return max(count, ends[number % len(ends)] + number // len(ends) % 3 - 1)


@pytest.mark.scorecard(1)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_mix(compiled, spec, count, figure):
    """Each set of the counts, in any order and with any number of threads; contexts around all kinds of ends."""
    module, rng = compiled(spec, attend=True), np.random.default_rng(0)
    variants = count(1, 18)
    sequences = [(each, contexts(spec, each, 5 * i + 7 * v)) for v in range(variants) for i, each in enumerate(COUNTS)]
    ragged = make_ragged(spec, sequences)
    expected = ragged.attend(module)
    assert_near_float64(spec, ragged, *expected)
    mixes = list(itertools.product((False, True), repeat=len(COUNTS)))
    for mix in itertools.islice(mixes, 0, None, count(3, 1)):
        chosen = np.flatnonzero(mix) + len(COUNTS) * rng.integers(0, variants, sum(mix))
        order = rng.permutation(chosen).astype(int)
        module.num_threads = int(rng.choice([1, 2, 8]))
        rows = [np.arange(*ragged.query_start_loc[each : each + 2]) for each in order]
        for one, whole in zip(ragged.take(order).attend(module), expected, strict=True):
            assert_same_bits(one, whole[np.concatenate([np.zeros(0, int), *rows])])
    figure("mixes of query tokens", len(mixes[:: count(3, 1)]))


@pytest.mark.scorecard(1)
def test_drawn_calls_of_drawn_specs(compiled, count, figure):
    """Of any type, layout, group and head_dim, and of both pipelines; every second draw is a call of attend."""
    numbers, worst = range(count(2, 76)), []
    for number in numbers:
        spec, pipeline, target = drawn_spec(number)
        module = compiled(spec, pipeline, target, attend=True)
        for draw in range(1, 2 * count(8, 14), 2):
            result = module.verify(seed=number, draw=draw)
            assert result.passed, (f"drawn_spec({number})", module, result.failures)
            worst.append(max(result.out.of_tolerance, result.lse.of_tolerance))
    figure("draws of attend", len(worst))
    figure("largest error of attend, of the bound", max(worst), worst=True)


SIZES = [(8, "float32", "HND"), (256, "bfloat16", "NHD"), (64, "float16", "packed"), (40, "bfloat16", "packed")]


@pytest.mark.scorecard(1)
def test_groups_from_1_to_17(compiled, count, figure):
    """With head_dims from 8 to 256, of all types and layouts."""
    chosen = (5, 17) if count(False, True) is False else range(1, 18)
    for group in chosen:
        head_dim, dtype, layout = SIZES[group % len(SIZES)]
        module = compiled(PagedAttentionSpec(2 * group, 2, head_dim, 16, dtype, kv_layout=layout), attend=True)
        sequences = [(1, 20), (2, 17), (33, 129), (9, 400)]
        trees = drawn_trees([each for each, _ in sequences], np.random.default_rng(group))
        for options in ({}, {"causal": False}, {"tree_mask": trees}):
            ragged = make_ragged(module.spec, sequences, **options)
            assert_near_float64(module.spec, ragged, *ragged.attend(module))
    figure("groups", len(chosen))


def fenced_call(spec, side, number):
    """A call in which each array is next to a page that may not be touched, and nothing is spare."""
    sequences = [(2, 2), (7, 100 + number), (1, spec.block_size), (33, 129), (0, 5), (3, 3)]
    trees = drawn_trees([each for each, _ in sequences], np.random.default_rng(number)).astype(np.uint8)
    options = ({}, {"causal": False}, {"tree_mask": fenced(trees, side)})[number % 3]
    ragged = make_ragged(spec, sequences, seed=number, spare_blocks=0, surplus=0, **options)
    names = ("key_cache", "value_cache", "block_table", "context_lens")
    arrays = {name: fenced(getattr(ragged.inputs, name), side) for name in names}
    starts, query = fenced(ragged.query_start_loc, side), fenced(ragged.query, side)
    return dataclasses.replace(ragged, query=query, inputs=ragged.inputs.replace(**arrays), query_start_loc=starts)


@pytest.mark.scorecard(11)
@pytest.mark.parametrize("pipeline", ["fused", "staged"])
@pytest.mark.parametrize("spec", [BASE, *list(SPECS.values())[3:]], ids=["float32", *list(SPECS)[3:]])
def test_nothing_beside_the_arrays_is_touched(compiled, spec, pipeline, count, figure):
    module = compiled(spec, pipeline, attend=True)
    module.num_threads = 1  # the child has no other threads

    def attend(side, number):
        ragged = fenced_call(spec, side, number)
        heads = (len(ragged.query), spec.num_heads)
        out = fenced(np.full((*heads, spec.result_dim), np.nan, ragged.inputs.out_dtype), side)
        lse = fenced(np.full(heads, np.nan, np.float32), side)
        module.attend(*ragged.arguments, out=out, lse=lse, **ragged.options)
        assert_near_float64(spec, ragged, out, lse)

    cases = [
        (f"{side} {number}", lambda side=side, number=number: attend(side, number))
        for side in SIDES
        for number in range(count(3, 30))
    ]
    figure("calls of attend", run_in_child(cases))
