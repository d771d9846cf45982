"""What a kernel must not read, and numbers at the ends of what it may."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from inputs import DTYPES, GARBAGE_IDS, POISONS, make_inputs, poison_value
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec

PIPELINES = ("fused", "staged")
LENGTHS = [0, 1, 4, 5, 6, 0, 33, 127, 128, 129, 130, 255, 257, 2047, 2050, 10, 15, 0, 16]

SPECS = {
    "float32": PagedAttentionSpec(6, 2, 16, 5, "float32"),
    "float32_no_copy": PagedAttentionSpec(6, 2, 16, 128, "float32"),
    "float16_HND": PagedAttentionSpec(6, 2, 16, 5, "float16", "float32", "HND"),
    "bfloat16_ragged_tile": PagedAttentionSpec(17, 1, 24, 16, "bfloat16"),
}

EVERY_SPEC = [
    pytest.param(spec, pipeline, id=f"{name}-{pipeline}")
    for (name, spec), pipeline in itertools.product(SPECS.items(), PIPELINES)
]
EXACT = SPECS["float32"]


def decode(module, inputs, scale=None):
    return module.decode(*inputs.arguments, scale, inputs.out, return_lse=True)


@pytest.mark.parametrize(("spec", "pipeline"), EVERY_SPEC)
def test_poison_in_unused_slots_and_blocks(compiled, spec, pipeline):
    module = compiled(spec, pipeline)
    clean = decode(module, make_inputs(spec, LENGTHS, poison="none"))
    assert np.isfinite(clean[0].astype(np.float32)).all()
    for poison in POISONS:
        for actual, expected in zip(decode(module, make_inputs(spec, LENGTHS, poison=poison)), clean, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize(("spec", "pipeline"), EVERY_SPEC)
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


@pytest.mark.parametrize(("spec", "pipeline"), EVERY_SPEC)
def test_out_before_the_call(compiled, spec, pipeline):
    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS)
    expected, expected_lse = module.decode(*inputs.arguments, return_lse=True)
    for poison in POISONS:
        out = np.full(inputs.out.shape, poison_value(poison, inputs.out_dtype))
        lse = np.full(inputs.lse.shape, poison_value(poison, inputs.lse.dtype))
        module.decode(*inputs.arguments, out=out, lse=lse)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize(("spec", "pipeline"), EVERY_SPEC)
def test_empty_sequences_at_every_position(compiled, spec, pipeline):
    module = compiled(spec, pipeline)
    for position in range(18):
        lengths = np.full(18, 7)
        lengths[position] = 0
        inputs = make_inputs(spec, lengths)
        out, lse = decode(module, inputs)
        assert_same_bits(out[position], np.zeros_like(out[position]))
        assert np.isneginf(lse[position]).all()
        assert_close_to_oracle(spec, inputs, out, lse)


@pytest.mark.parametrize("scale", [1e5, -1e5, 1e30, -1e30])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_huge_scores_pick_one_token(compiled, pipeline, scale):
    """Scores up to +-2e6 and +-2e31, further apart than exp can see: softmax is one-hot, out one token's value."""
    inputs = make_inputs(EXACT, LENGTHS)
    inputs.query[:] = 0
    inputs.query[..., 0] = 0.5
    slots = inputs.key_cache[..., 0]
    slots[np.isfinite(slots)] = np.random.default_rng(1).permutation(np.isfinite(slots).sum()) * 2.0**-8
    out, lse = decode(compiled(EXACT, pipeline), inputs, scale)
    assert np.isfinite(out).all()
    assert_same_bits(out, oracle_one_hot(inputs, np.sign(scale)))
    assert np.isfinite(lse[inputs.context_lens > 0]).all()


def oracle_one_hot(inputs, sign):
    """The value of the token with the largest sign * key[0], by search."""
    out = inputs.out
    group, size = EXACT.group, EXACT.block_size
    for sequence, length in enumerate(inputs.context_lens):
        out[sequence] = 0
        for kv_head in range(EXACT.num_kv_heads if length else 0):
            blocks = inputs.block_table[sequence, : -(-length // size)]
            keys = inputs.key_cache[blocks, :, kv_head, 0].reshape(-1)[:length]
            best = np.argmax(sign * keys)
            value = inputs.value_cache[blocks[best // size], best % size, kv_head]
            out[sequence, kv_head * group : (kv_head + 1) * group] = value
    return out


@pytest.mark.parametrize("score", [-2e30, -1e30, -1e38, 1e38, -1e-40, 1e-40])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_equal_scores_weigh_equally(compiled, pipeline, score):
    """Below the -1e30 that stands for "no score yet" too: these are scores like any other."""
    inputs = make_inputs(EXACT, [0, 1, 4, 8, 16, 64, 128, 1024, 4096])
    inputs.query[:] = 0
    inputs.query[..., 0] = 1
    keys, values = inputs.key_cache[..., 0], inputs.value_cache
    keys[np.isfinite(keys)] = 1
    values[np.isfinite(values)] = 0.5
    out, lse = decode(compiled(EXACT, pipeline), inputs, score)
    assert_close_to_oracle(EXACT, inputs, out, lse, score)
    assert (out[1:] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_very_low_scores_after_ordinary_ones(compiled, pipeline, dtype):
    """The first block is far below the second, or the other way round: the rescaling may underflow, never overflow."""
    spec = PagedAttentionSpec(2, 1, 16, 16, dtype)
    inputs = make_inputs(spec, [32, 160, 4112])
    low = -(2.0**15) if dtype == "float16" else -(2.0**100)
    inputs.query[..., 0] = 1
    for sequence, low_half in ((0, slice(0, 1)), (1, slice(5, 10)), (2, slice(0, 128))):
        inputs.key_cache[inputs.block_table[sequence, low_half], :, :, 0] = low
    module = compiled(spec, pipeline)
    out, lse = decode(module, inputs, 1.0)
    assert_close_to_oracle(spec, inputs, out, lse, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_equal_weights_of_powers_of_two_are_exact(compiled, pipeline, dtype):
    """Scores of 0 over 2^n tokens, values of small integers: every sum and every quotient is a float."""
    spec = PagedAttentionSpec(2, 1, 16, 16, dtype, "float32")
    module = compiled(spec, pipeline)
    lengths = [1 << power for power in range(13)]
    rng = np.random.default_rng(2)
    inputs = make_inputs(spec, lengths, poison="none")
    inputs.query[:] = 0
    inputs.value_cache[:] = rng.integers(-4, 5, inputs.value_cache.shape)
    out, _ = decode(module, inputs)
    for sequence, length in enumerate(lengths):
        values = inputs.value_cache[inputs.block_table[sequence, : -(-length // 16)]].astype(np.float64)
        exact = values.reshape(-1, 16)[:length].sum(axis=0) / length
        np.testing.assert_array_equal(out[sequence], np.broadcast_to(exact, (2, 16)))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_subnormal_values_are_not_flushed(compiled, pipeline):
    inputs = make_inputs(EXACT, [1, 1])
    inputs.value_cache[np.isfinite(inputs.value_cache)] = 2.0**-140
    out, _ = decode(compiled(EXACT, pipeline), inputs)
    np.testing.assert_array_equal(out, np.float32(2.0**-140))
