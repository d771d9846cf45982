"""The plan of attend: a pure function of lengths and threads that covers what each query token sees once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from specs import BASE, SPECS

from pa_compiler import AttendItem, WorkItem, backends
from pa_compiler.cpu import target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.key_ranges import attend_range_blocks, attend_tiles

BATCHES = {
    "none": [],
    "nothing_asked": [(0, 5), (0, 0)],
    "one_token_each": [(1, 5), (1, 4000), (1, 1)],
    "prompt": [(700, 700)],
    "chunk_beside_decodes": [(1, 300)] * 5 + [(512, 3000)] + [(1, 2000), (1, 1)] * 3,
    "guesses": [(4, 9000), (2, 100), (8, 8), (3, 20000)],
    "mix": [(0, 7), (1, 1), (2, 2), (7, 30), (16, 16), (33, 5000), (1, 9), (0, 0), (65, 65)],
}
every_batch = pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def plan(module, sequences, threads=4):
    module.num_threads = threads
    counts, lens = (np.array([each[i] for each in sequences], np.int32) for i in range(2))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return module.plan(lens, starts), starts


def seen_blocks(spec, first_pos, last_pos):
    begin = 0 if spec.window is None else max(0, first_pos + 1 - spec.window)
    return begin // spec.block_size, last_pos // spec.block_size + 1


def visits(spec, items, starts):
    """How often items come to a query token with a kv head and a block, beyond what the token sees too."""
    found = {}
    for item in items:
        if isinstance(item, WorkItem):
            rows = [
                (starts[seq], range(spec.num_kv_heads))
                for seq in range(item.batch_start, item.batch_start + item.num_seqs)
            ]
        else:
            heads = range(item.kv_head_begin, item.kv_head_begin + item.num_kv_heads)
            rows = [(token, heads) for token in range(item.token_begin, item.token_begin + item.num_query)]
        for token, heads in rows:
            for head in heads:
                for block in range(item.block_begin, item.block_end):
                    found[token, head, block] = found.get((token, head, block), 0) + 1
    return found


@every_batch
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_each_token_head_and_block_once(compiled, sequences, window, threads):
    spec = dataclasses.replace(BASE, window=window)
    items, starts = plan(compiled(spec, attend=True), sequences, threads)
    found = visits(spec, items, starts)
    assert set(found.values()) <= {1}
    for seq, (count, length) in enumerate(sequences):
        for i in range(count):
            position = length - count + i
            for block in range(*seen_blocks(spec, position, position)):
                for head in range(spec.num_kv_heads):
                    assert (starts[seq] + i, head, block) in found


@every_spec
@every_batch
def test_items(compiled, spec, sequences):
    """They fit into the kernels' scratch, are of one sequence, and read no block that none of their tokens sees."""
    row_tile = tiling.choose_attend(spec, target.resolve(backends.normalize("llvm"))).row_tile
    for threads in (1, 3):
        items, starts = plan(compiled(spec, attend=True), sequences, threads)
        for item in items:
            if isinstance(item, WorkItem):
                assert {sequences[item.batch_start + i][0] for i in range(item.num_seqs)} == {1}
                continue
            count, length = sequences[item.seq]
            assert count > 1
            assert starts[item.seq] <= item.token_begin < item.token_begin + item.num_query <= starts[item.seq + 1]
            assert item.first_pos == length - count + item.token_begin - starts[item.seq]
            tiles = -(-item.num_query * spec.group // row_tile)
            assert item.num_kv_heads * tiles <= attend_tiles(spec, row_tile)
            begin, end = seen_blocks(spec, item.first_pos, item.first_pos + item.num_query - 1)
            assert begin <= item.block_begin < item.block_end <= end


@every_spec
@every_batch
def test_the_same_lengths_and_threads_give_the_same_plan(compiled, spec, sequences):
    module = compiled(spec, attend=True)
    for threads in (1, 2, 8):
        assert plan(module, sequences, threads)[0] == plan(module, sequences, threads)[0]


@every_batch
def test_the_longest_item_is_dealt_first(compiled, sequences):
    items, _ = plan(compiled(BASE, attend=True), sequences)
    for kind, field in ((AttendItem, "work"), (WorkItem, "num_tokens")):
        work = [getattr(item, field) for item in items if isinstance(item, kind)]
        assert work == sorted(work, reverse=True)


def test_keys_are_cut_at_multiples_of_a_range(compiled):
    """And not at all for one thread, or where there are items enough."""
    module, cut = compiled(BASE, attend=True), attend_range_blocks(BASE)
    length = (3 * cut + 1) * BASE.block_size
    items, _ = plan(module, [(2, length)], 8)
    assert {(item.block_begin, item.block_end) for item in items} == {
        *((begin, begin + cut) for begin in (0, cut, 2 * cut)), (3 * cut, 3 * cut + 1)
    }  # fmt: skip
    for threads, sequences in ((1, [(2, length)]), (2, [(2, length)] * 20)):
        assert {(item.block_begin, item.block_end) for item in plan(module, sequences, threads)[0]} == {
            (0, 3 * cut + 1)
        }


def test_work_is_divided_for_the_threads(compiled):
    """No thread has more than its share and one item."""
    module = compiled(dataclasses.replace(BASE, num_heads=32, num_kv_heads=8), attend=True)
    for sequences in ([(4, 9000)], [(512, 512)], [(512, 8192), *[(1, 2000)] * 31], [(4, 2048)] * 8):
        for threads in (2, 4, 8):
            work = [item.work for item in plan(module, sequences, threads)[0] if isinstance(item, AttendItem)]
            assert max(work) <= sum(work) / threads


def test_a_triangle_is_half_of_a_square(compiled):
    items, _ = plan(compiled(BASE, attend=True), [(1024, 1024)], 1)
    triangle = sum(item.work for item in items)
    items, _ = plan(compiled(BASE, attend=True), [(1024, 9 * 1024)], 1)
    assert triangle == pytest.approx(sum(item.work for item in items) / 17, rel=0.05)


def test_plans_for_many_query_tokens_are_fast(compiled):
    items, _ = plan(compiled(BASE, attend=True), [(1, 1000)] * 1000 + [(16384, 16384)], 2)
    assert len(items) < 2000


@pytest.mark.parametrize(
    ("lens", "starts", "message"),
    [
        ([5], [1, 2], r"query_start_loc: expected 0 first, got 1"),
        ([5, 5], [0, 3, 2], r"query_start_loc: expected numbers that never fall, got 2 after 3 at position 2"),
        ([5], [0, 6], r"query_start_loc: expected up to 5 query tokens of sequence 0, .*, got 6"),
        ([-1], [0, 0], r"context_lens: expected a length .*, got -1"),
        ([5], [0], r"query_start_loc: expected shape \[2\], got \[1\]"),
    ],
)
def test_bad_lengths(compiled, lens, starts, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        compiled(BASE, attend=True).plan(np.array(lens), np.array(starts))
