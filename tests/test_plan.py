"""The plan of work items: a pure function of the lengths that covers everything once."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from specs import BASE, SPECS, every_pipeline, every_spec, lengths_around_the_splits, range_tokens

from pa_compiler import key_ranges

BATCHES = {
    "none": [],
    "empty": [0, 0, 0],
    "one_token": [1],
    "chunk_and_a_half": list(range(24)),
    "around_the_splits": sorted({length for spec in SPECS.values() for length in lengths_around_the_splits(spec)}),
    "long_and_short": [20000, 1, 1, 1, 8192, 5, 0, 16001] * 3,
    "random": np.random.default_rng(0).integers(0, 9000, 49).tolist(),
}

every_batch = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)


def plan(module, lengths):
    return module.plan(np.asarray(lengths, np.int32))


def blocks_of(spec, length):
    return -(-length // spec.block_size)


def ranges_of(spec, items, lengths, sequence):
    """The block ranges that one sequence is cut into."""
    return sorted(
        (item.block_begin, min(item.block_end, blocks_of(spec, lengths[sequence])))
        for item in items
        if item.batch_start <= sequence < item.batch_start + item.num_seqs
    )


@every_spec
@every_batch
def test_each_block_once(compiled, spec, pipeline, lengths):
    items = plan(compiled(spec, pipeline), lengths)
    visits = np.zeros((len(lengths), blocks_of(spec, max(lengths, default=0))), int)
    for item in items:
        for sequence in range(item.batch_start, item.batch_start + item.num_seqs):
            end = min(item.block_end, blocks_of(spec, lengths[sequence]))
            visits[sequence, item.block_begin : end] += 1
    used = np.arange(visits.shape[1]) < np.array([blocks_of(spec, length) for length in lengths]).reshape(-1, 1)
    np.testing.assert_array_equal(visits, used)


@every_spec
@every_batch
def test_items_keep_to_one_chunk(compiled, spec, pipeline, lengths):
    for item in plan(compiled(spec, pipeline), lengths):
        assert 1 <= item.num_seqs <= spec.batch_chunk
        last = item.batch_start + item.num_seqs - 1
        assert item.batch_start // spec.batch_chunk == last // spec.batch_chunk


@every_spec
@every_batch
def test_tokens_are_counted_and_the_longest_item_is_dealt_first(compiled, spec, pipeline, lengths):
    items = plan(compiled(spec, pipeline), lengths)
    for item in items:
        begin, end = item.block_begin * spec.block_size, item.block_end * spec.block_size
        sequences = lengths[item.batch_start : item.batch_start + item.num_seqs]
        assert item.num_tokens == sum(max(0, min(end, length) - begin) for length in sequences)
    tokens = [item.num_tokens for item in items]
    assert tokens == sorted(tokens, reverse=True)


@every_batch
def test_a_sequence_is_cut_by_its_own_length_alone(compiled, lengths):
    module = compiled(BASE)
    items = plan(module, lengths)
    for sequence, length in enumerate(lengths):
        alone = ranges_of(BASE, plan(module, [length]), [length], 0)
        assert ranges_of(BASE, items, lengths, sequence) == alone


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sequences_are_cut_into_the_fewest_equal_ranges(compiled, spec):
    """None longer than range_tokens; the last one may be shorter than the others, and is not empty.

    Where ranges are cut at fixed positions, all others have that length.
    """
    module = compiled(spec)
    for length in lengths_around_the_splits(spec):
        blocks = blocks_of(spec, length)
        ranges = ranges_of(spec, plan(module, [length]), [length], 0)
        assert len(ranges) == -(-length // range_tokens(spec)), length
        assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])], length
        assert ranges[-1][1] == blocks, length
        sizes = [end - begin for begin, end in ranges]
        even = -(-blocks // len(ranges))
        size = range_tokens(spec) // spec.block_size if key_ranges.decodes_in_step(spec) else even
        assert sizes[:-1] == [size] * (len(ranges) - 1), length
        assert 0 < sizes[-1] <= sizes[0], length


@pytest.mark.parametrize(("kv_heads", "tokens"), [(1, 2048), (4, 512), (32, 256)])
def test_long_sequences_are_split(compiled, kv_heads, tokens):
    """Into ranges of 2048 tokens over the kv heads, but no fewer than 256, up to whole blocks; a shorter one stays."""
    spec = dataclasses.replace(BASE, num_heads=kv_heads, num_kv_heads=kv_heads)
    module = compiled(spec)
    for length in (tokens + 1 + spec.block_size, 5000, 131072):
        ranges = ranges_of(spec, plan(module, [length]), [length], 0)
        assert len(ranges) > 1
        assert all((end - begin - 1) * spec.block_size < tokens for begin, end in ranges)
    assert len(ranges_of(spec, plan(module, [tokens]), [tokens], 0)) == 1


@every_pipeline
@every_batch
@pytest.mark.parametrize("window", [1, 100, 3001])
def test_a_window(compiled, pipeline, window, lengths):
    """Each token that is seen is counted once, and an item is no wider than what its sequences see."""
    spec = dataclasses.replace(BASE, window=window)
    size, seen = spec.block_size, np.zeros(len(lengths), int)
    for item in plan(compiled(spec, pipeline), lengths):
        sequences = range(item.batch_start, item.batch_start + item.num_seqs)
        ranges = [
            (max(lengths[each] - window, item.block_begin * size), min(lengths[each], item.block_end * size))
            for each in sequences
        ]
        ranges = [(begin, max(begin, end)) for begin, end in ranges]
        seen[sequences] += [end - begin for begin, end in ranges]
        assert item.num_tokens == sum(end - begin for begin, end in ranges)
        shown = [(begin // size, -(-end // size)) for begin, end in ranges if begin < end]
        edges = (min(begin for begin, _ in shown), max(end for _, end in shown)) if shown else (0, 0)
        assert (item.block_begin, item.block_end) == edges
    assert seen.tolist() == [min(length, window) for length in lengths]


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
@pytest.mark.parametrize("name", ["float32_MQA", "bfloat16_HND"])
def test_a_window_costs_what_a_context_of_its_length_costs(compiled, name, pipeline):
    """Its plan is that of such a context, so many blocks later. One that begins within a block has a block more."""
    spec = SPECS[name]
    window, windowed = 24 * 128, compiled(dataclasses.replace(spec, window=24 * 128), pipeline)
    for hidden in (1, 2, 1000):
        blocks = hidden * 128 // spec.block_size
        later = [
            item._replace(block_begin=item.block_begin + blocks, block_end=item.block_end + blocks)
            for item in plan(compiled(spec, pipeline), [window])
        ]
        assert plan(windowed, [window + hidden * 128]) == later
        items = plan(windowed, [window + hidden * 128 + 3])
        assert sum(item.num_tokens for item in items) == window
        assert min(item.block_begin for item in items) == blocks
        assert max(item.block_end for item in items) == blocks + window // spec.block_size + 1


def test_packed_sequences_are_cut_at_fixed_positions(compiled):
    """Where attend cuts them, whatever their lengths and windows."""
    spec = SPECS["bfloat16_packed"]
    step = key_ranges.attend_range_blocks(spec)
    assert step * spec.block_size == key_ranges.SPLIT_TOKENS // spec.num_kv_heads
    for window, length in itertools.product((None, 3000), (1024, 1025, 5000, 5016, 9999)):
        items = plan(compiled(dataclasses.replace(spec, window=window)), [length])
        first, end = max(length - (window or length), 0) // spec.block_size, -(-length // spec.block_size)
        begins = [first, *range((first // step + 1) * step, end, step)]
        assert sorted(item.block_begin for item in items) == begins
        assert sorted(item.block_end for item in items) == [*begins[1:], end]


def test_the_smallest_first_block_of_a_chunk_of_the_staged_pipeline(compiled):
    """Of its sequences that are not empty."""
    module = compiled(dataclasses.replace(BASE, window=10), "staged")
    (item,) = plan(module, [0, 1000, 0, 800])
    assert item == (0, 4, 790 // 5, 200, 20)


@every_pipeline
@every_batch
def test_pure(compiled, pipeline, lengths):
    """The same again, and at any number of threads."""
    module = compiled(BASE, pipeline)
    plans = []
    for threads in (1, 2, 7, 2):
        module.num_threads = threads
        plans.append(plan(module, lengths))
    assert plans == [plans[0]] * 4


def test_plan_names_its_fields(compiled):
    (item,) = plan(compiled(SPECS["float32_MQA"]), [300])
    assert item._asdict() == {
        "batch_start": 0,
        "num_seqs": 1,
        "block_begin": 0,
        "block_end": 3,
        "num_tokens": 300,
    }


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("lengths", "error", "shows"),
    [
        (np.array([3, -1], np.int32), ValueError, "-1"),
        (np.array([[3]], np.int32), ValueError, r"\[1, 1\]"),
        (np.array([3.0], np.float32), TypeError, "float32"),
        ([3], TypeError, "list"),
    ],
    ids=["negative", "rank_2", "float", "list"],
)
def test_bad_lengths_are_refused(figure, compiled, lengths, error, shows):
    with pytest.raises(error, match=rf"^context_lens\b.*{shows}"):
        compiled(BASE).plan(lengths)
    figure("kinds", 1)
