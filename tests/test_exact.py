"""Data whose results are exact in every type: a sum in the wrong place, or one term too many, is no rounding error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from drawn_specs import drawn_spec
from inputs import lay_out, make_inputs
from specs import every_spec

TIES = (1, 1, 2, 4, 8)
"""Tokens with the largest score. As many whole numbers up to 16 have a mean that is exact in bfloat16."""
ELEMENTS = 1 << 19
"""Of the keys of a case, at most."""


def tied_scores(spec, seed):
    """Inputs, their scale, and what is to come out, in float64: the mean over the few tokens that all weight is on.

    Scores are powers of two, so far apart that exp gives 0. The tokens lie anywhere, at the ends of blocks and
    sequences too, and each kv head has others.
    """
    rng = np.random.default_rng(seed)
    size = spec.block_size
    longest = max(ELEMENTS // (spec.num_kv_heads * spec.head_dim * 4), 8)
    lengths = np.minimum(rng.choice([1, size, size + 1, 3 * size, 129, 300, 2050], rng.integers(1, 5)), longest)
    inputs = make_inputs(dataclasses.replace(spec, kv_layout="NHD"), lengths, seed=seed)
    heads, dims = np.arange(spec.num_heads), rng.integers(0, spec.head_dim, (len(lengths), spec.num_heads))
    sign = 1 - 2 * (np.arange(spec.head_dim) % 2)  # by element, so that the largest score is not the largest product
    inputs.query[...] = 0
    expected = np.zeros(inputs.query.shape)
    for sequence, length in enumerate(lengths):
        inputs.query[sequence, heads, dims[sequence]] = sign[dims[sequence]] * 2.0 ** rng.integers(0, 4)
        key = -(2.0 ** rng.integers(0, 4, (length, spec.num_kv_heads, 1))) * sign
        value = rng.uniform(-1, 1, key.shape).astype(spec.dtype)
        for kv_head in range(spec.num_kv_heads):
            count = int(rng.choice([ties for ties in TIES if ties <= length]))
            ends = [t for t in (0, size - 1, size, length - 1) if t < length]
            tied = rng.choice(ends, 1) if count == 1 and rng.random() < 0.5 else rng.permutation(length)[:count]
            key[tied, kv_head] = sign
            value[tied, kv_head] = rng.integers(-16, 17, (count, spec.head_dim))
            group = slice(kv_head * spec.group, (kv_head + 1) * spec.group)
            expected[sequence, group] = value[tied, kv_head].astype(np.float64).mean(axis=0)
        write_tokens(inputs, sequence, key, value)
    caches = lay_out(spec, inputs.key_cache, inputs.value_cache)
    return inputs.replace(key_cache=caches[0], value_cache=caches[1]), 2.0 ** rng.choice([10, 30, 60]), expected


def equal_scores(spec, seed):
    """The same for 2^n tokens of which each weighs as much, and at most 255 are not 0 but one power of two."""
    rng = np.random.default_rng(seed)
    longest = max(ELEMENTS // (spec.num_kv_heads * spec.head_dim * 4), 8)
    lengths = np.array([1 << power for power in rng.integers(0, 13, rng.integers(1, 5))])
    lengths = lengths[lengths <= longest]
    inputs = make_inputs(dataclasses.replace(spec, kv_layout="NHD"), lengths, seed=seed)
    inputs.query[...] = 0
    expected = np.zeros(inputs.query.shape)
    for sequence, length in enumerate(lengths):
        key = rng.uniform(-1, 1, (length, spec.num_kv_heads, spec.head_dim))
        some = rng.permutation(length)[: rng.integers(1, 256)]
        value = np.zeros(key.shape)
        value[some] = 2.0 ** rng.integers(-3, 4, key.shape[1:]) * rng.choice([-1, 1])
        expected[sequence] = np.repeat(value.mean(axis=0), spec.group, axis=0)
        write_tokens(inputs, sequence, key, value)
    caches = lay_out(spec, inputs.key_cache, inputs.value_cache)
    return inputs.replace(key_cache=caches[0], value_cache=caches[1]), None, expected


def write_tokens(inputs, sequence, key, value):
    """Put keys and values [tokens, num_kv_heads, head_dim] of a sequence into caches in NHD."""
    size, token = inputs.key_cache.shape[1], np.arange(len(key))
    place = inputs.block_table[sequence, token // size], token % size
    inputs.key_cache[place], inputs.value_cache[place] = key, value


def check(module, make, seed):
    inputs, scale, expected = make(module.spec, seed)
    module.num_threads = 1 + seed % 3
    out = module.decode(*inputs.arguments, scale, inputs.out)
    np.testing.assert_array_equal(out.astype(np.float64), expected, err_msg=f"{module}, {make.__name__}, {seed}")


@every_spec
@pytest.mark.scorecard(3)
@pytest.mark.parametrize("make", [tied_scores, equal_scores], ids=lambda make: make.__name__)
def test_exact(compiled, spec, pipeline, make, count, figure):
    cases = count(6, 60)
    for seed in range(cases):
        check(compiled(spec, pipeline), make, seed)
    figure("cases", cases)


@pytest.mark.scorecard(3)
def test_exact_with_drawn_specs(compiled, count, figure):
    numbers, cases = count(2, 48), count(3, 6)
    for number in range(numbers):
        for seed in range(cases):
            for make in (tied_scores, equal_scores):
                check(compiled(*drawn_spec(number, scores=False)), make, seed)
    figure("cases", 2 * numbers * cases)
