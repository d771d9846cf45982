"""What a kernel must not read, and numbers at the ends of what it may."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_specs import drawn_spec
from inputs import GARBAGE_IDS, POISONS, make_inputs, poison_value
from specs import BASE, DTYPE_SPECS, every_pipeline, every_spec, parametrize
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
        module = compiled(*drawn_spec(number))
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


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("scale", [1e5, -1e5, 1e30, -1e30])
@every_pipeline
def test_huge_scores_pick_one_token(compiled, pipeline, scale, figure):
    """Scores up to +-2e6 and +-2e31, further apart than exp can see: softmax is one-hot, out one token's value."""
    inputs = make_inputs(BASE, LENGTHS)
    inputs.query[:] = 0
    inputs.query[..., 0] = 0.5
    slots = inputs.key_cache[..., 0]
    slots[np.isfinite(slots)] = np.random.default_rng(1).permutation(np.isfinite(slots).sum()) * 2.0**-8
    out, lse = decode(compiled(BASE, pipeline), inputs, scale)
    assert np.isfinite(out).all()
    assert_same_bits(out, oracle_one_hot(inputs, np.sign(scale)))
    assert np.isfinite(lse[inputs.context_lens > 0]).all()
    figure("sequences of extreme scores", len(LENGTHS))


def oracle_one_hot(inputs, sign):
    """The value of the token with the largest sign * key[0], by search."""
    out = inputs.out
    group, size = BASE.group, BASE.block_size
    for sequence, length in enumerate(inputs.context_lens):
        out[sequence] = 0
        for kv_head in range(BASE.num_kv_heads if length else 0):
            blocks = inputs.block_table[sequence, : -(-length // size)]
            keys = inputs.key_cache[blocks, :, kv_head, 0].reshape(-1)[:length]
            best = np.argmax(sign * keys)
            value = inputs.value_cache[blocks[best // size], best % size, kv_head]
            out[sequence, kv_head * group : (kv_head + 1) * group] = value
    return out


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
    some = inputs.take([1, 2, 3])
    assert_close_to_oracle(spec, some, out[1:4], lse[1:4], 1.0)


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("score", [-5e5, 5e5, -2e30, -1e30, 1e30, -1e38, 1e38, -1e-40, 1e-40])
@every_pipeline
def test_equal_scores_weigh_equally(compiled, pipeline, score, figure):
    """Below the -1e30 that stands for "no score yet" too: these are scores like any other."""
    inputs = make_inputs(BASE, [0, 1, 4, 8, 16, 64, 128, 1024, 4096])
    inputs.query[:] = 0
    inputs.query[..., 0] = 1
    keys, values = inputs.key_cache[..., 0], inputs.value_cache
    keys[np.isfinite(keys)] = 1
    values[np.isfinite(values)] = 0.5
    out, lse = decode(compiled(BASE, pipeline), inputs, score)
    assert_close_to_oracle(BASE, inputs, out, lse, score)
    assert (out[1:] == 0.5).all()
    figure("sequences of extreme scores", len(out))


@pytest.mark.scorecard(8)
@parametrize(DTYPE_SPECS)
def test_very_low_scores_before_and_after_ordinary_ones(compiled, spec, pipeline):
    """Half of the blocks are far below the other half: the rescaling may underflow, it must not overflow."""
    size = spec.block_size
    inputs = make_inputs(spec, [2 * size, 10 * size, 258 * size, 800 * size])
    low = -(2.0**15) if spec.dtype == "float16" else -(2.0**100)
    inputs.query[..., 0] = 1
    for sequence, low_half in enumerate((slice(0, 1), slice(5, 10), slice(0, 129), slice(400, 800))):
        inputs.key_cache[inputs.block_table[sequence, low_half], :, :, 0] = low
    out, lse = decode(compiled(spec, pipeline), inputs, 1.0)
    assert_close_to_oracle(spec, inputs, out, lse, 1.0)


@pytest.mark.scorecard(8)
@every_pipeline
def test_subnormal_values_are_not_flushed(compiled, pipeline):
    inputs = make_inputs(BASE, [1, 1])
    inputs.value_cache[np.isfinite(inputs.value_cache)] = 2.0**-140
    out, _ = decode(compiled(BASE, pipeline), inputs)
    np.testing.assert_array_equal(out, np.float32(2.0**-140))
