"""What a kernel must not read, and scores of -inf, with which others do it."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_specs import drawn_spec
from inputs import GARBAGE_IDS, POISONS, make_inputs, poison_value
from specs import every_spec
from tolerances import assert_close_to_oracle, assert_same_bits

LENGTHS = [0, 1, 4, 5, 6, 0, 33, 127, 128, 129, 130, 255, 257, 2047, 2050, 10, 15, 0, 16]


def decode(module, inputs, scale=None):
    return module.decode(*inputs.arguments, scale, inputs.out, return_lse=True)


def check_poison(module, lengths, seed):
    """Poison where no token is, in the block table's surplus entries, in out and lse, and in scratch: the same bits."""
    spec = module.spec
    module.num_threads = 1 + seed % 2
    clean = make_inputs(spec, lengths, seed=seed, poison="none")
    nothing_else = clean.replace(
        **{name: np.full_like(getattr(clean, name), np.nan) for name in ("query", "key_cache", "value_cache")}
    )
    expected = module.decode(*clean.arguments, return_lse=True)
    assert np.isfinite(expected[0].astype(np.float32)).all()
    for poison in POISONS:
        inputs = make_inputs(spec, lengths, seed=seed, poison=poison)
        out = np.full(inputs.out.shape, poison_value(poison, inputs.out_dtype))
        lse = np.full(inputs.lse.shape, poison_value(poison, inputs.lse.dtype))
        assert np.isnan(decode(module, nothing_else)[0][lengths != 0].astype(np.float32)).all()  # scratch too, then
        module.decode(*inputs.arguments, out=out, lse=lse)
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])


@pytest.mark.scorecard(10)
@every_spec
def test_poison_wherever_nothing_is_to_be_read(compiled, spec, pipeline, count, figure):
    seeds = count(1, 30)
    for seed in range(seeds):
        lengths = np.random.default_rng(seed).permutation(LENGTHS)[: None if seed == 0 else 6]
        check_poison(compiled(spec, pipeline), lengths, seed)
    figure("calls", seeds * len(POISONS))


@pytest.mark.scorecard(10)
def test_poison_with_drawn_specs(compiled, count, figure):
    numbers = count(2, 48)
    for number in range(numbers):
        module = compiled(*drawn_spec(number, scores=False))
        size = module.spec.block_size
        check_poison(module, np.array([0, 1, size - 1, size, size + 1, 130, 17]), number)
    figure("calls", numbers * len(POISONS))


@every_spec
def test_surplus_entries_of_the_block_table(compiled, spec, pipeline):
    """Any number of them, holding anything, a valid id included."""
    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS, surplus=0)
    needed = -(-inputs.context_lens // spec.block_size)
    surplus = np.arange(inputs.block_table.shape[1]) >= needed[:, None]
    expected, _ = decode(module, inputs)
    for garbage in (*GARBAGE_IDS, len(inputs.key_cache), 0):
        table = np.where(surplus, garbage, inputs.block_table).astype(np.int32)
        wide = np.concatenate([table, np.full((len(table), 300), garbage, np.int32)], axis=1)
        for block_table in (table, wide):
            assert_same_bits(decode(module, inputs.replace(block_table=block_table))[0], expected)


@every_spec
@pytest.mark.scorecard(7)
def test_empty_sequences_at_every_position(compiled, spec, pipeline, count, figure):
    """Alone among others, and with others that are as empty, in batches of more than a chunk."""
    module, batch = compiled(spec, pipeline), count(18, 50)
    figure("positions", 2 * batch)
    for position in range(batch):
        for share_empty in (0, 0.5):
            rng = np.random.default_rng(position)
            lengths = np.where(rng.random(batch) < share_empty, 0, rng.integers(1, 40, batch))
            lengths[position] = 0
            inputs, empty = make_inputs(spec, lengths), lengths == 0
            out, lse = decode(module, inputs)
            assert_same_bits(out[empty], np.zeros_like(out[empty]))
            assert np.isneginf(lse[empty]).all()
            assert_close_to_oracle(spec, inputs, out, lse)


@every_spec
def test_scores_of_minus_infinity_weigh_nothing(compiled, spec, pipeline):
    """Whole tiles of them too, before and after others; a sequence of nothing else is as an empty one."""
    inputs = make_inputs(spec, [1, 17, 300, 2500, 40])
    inputs.query[:] = 0
    inputs.query[..., 0] = 1
    size, pair = spec.block_size, spec.packed_pair
    blocks = [row[: -(-length // size)] for row, length in zip(inputs.block_table, inputs.context_lens, strict=True)]
    low = np.concatenate([blocks[0], blocks[2][: 200 // size], blocks[3][300 // size :], blocks[4]])
    first = inputs.key_cache[..., 0, ::pair] if spec.kv_layout == "packed" else inputs.key_cache[..., 0]
    first[low] = -np.inf
    out, lse = decode(compiled(spec, pipeline), inputs, 1.0)
    assert np.isneginf(lse[[0, 4]]).all()
    assert not out[[0, 4]].any()
    assert_close_to_oracle(spec, inputs, out, lse, 1.0)
