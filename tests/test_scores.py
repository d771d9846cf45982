"""Windows, soft caps, ALiBi and sinks in compiled kernels, against the float64 reference and against each other."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from drawn_specs import DRAWS_SCORES
from inputs import POISONS, make_inputs, poison_value
from specs import every_pipeline, lengths_around_the_splits
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec

pytestmark = pytest.mark.skipif(not DRAWS_SCORES, reason="the targets have no kernels for score functions yet")

BASES = {  # of every strategy, sweeps first: the permuted order of tokens
    "32/32_float32": PagedAttentionSpec(32, 32, 16, 16, "float32"),
    "32/32_bfloat16_HND": PagedAttentionSpec(32, 32, 16, 16, "bfloat16", kv_layout="HND"),
    "32/32_float16_packed": PagedAttentionSpec(32, 32, 16, 16, "float16", "float32", kv_layout="packed"),
    "8/2_float32_sweep": PagedAttentionSpec(8, 2, 24, 5, "float32"),
    "8/2_bfloat16": PagedAttentionSpec(8, 2, 32, 16, "bfloat16", "float32"),
    "32/8_float16": PagedAttentionSpec(32, 8, 16, 8, "float16"),
    "32/8_bfloat16_packed": PagedAttentionSpec(32, 8, 16, 32, "bfloat16", kv_layout="packed"),
    "32/8_float32_packed": PagedAttentionSpec(32, 8, 16, 16, "float32", kv_layout="packed"),
    "16/1_float32": PagedAttentionSpec(16, 1, 16, 128, "float32"),
    "16/1_bfloat16": PagedAttentionSpec(16, 1, 32, 64, "bfloat16"),
    "5/1_float32_HND": PagedAttentionSpec(5, 1, 24, 16, "float32", kv_layout="HND", head_tile=4),
    "5/1_bfloat16_odd": PagedAttentionSpec(5, 1, 17, 1, "bfloat16"),
    "16/1_values_of_8": PagedAttentionSpec(16, 1, 24, 16, "float16", "float32", value_dim=8),
    "16/1_one_cache": PagedAttentionSpec(16, 1, 48, 16, "bfloat16", value_dim=32, shared_kv=True),
}

FIELDS = {
    "window": {"window": 100},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 1.5, "alibi": True, "sinks": True},
}
ALL = FIELDS["all"]

WINDOWS = (1, 7, 16, 100, 128, 129, 1024, 4096, 100_000)

LENGTHS = [5000, 0, 1, 17, 99, 100, 101, 33, 127, 128, 129, 228, 229, 0, 16, 2049, 15]


def spec_of(base, fields):
    return dataclasses.replace(BASES[base], **fields)


def lengths_of(spec, lengths=LENGTHS):
    """Lengths, with those around the window and the ends of its blocks."""
    window = min(spec.window or 1, 6000)
    near = {window + step for step in (-1, 0, 1, spec.block_size - 1, spec.block_size, spec.block_size + 1)}
    return [*lengths, *sorted(near), 2 * window + 3]


def decode(module, inputs, scale=None):
    return module.decode(*inputs.arguments, scale, inputs.out, lse=inputs.lse, **inputs.heads)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def check(compiled, spec, pipeline, lengths, **more):
    """With a scale that makes some scores larger than the soft cap."""
    inputs = make_inputs(spec, lengths, **more)
    assert_close_to_oracle(spec, inputs, *decode(compiled(spec, pipeline), inputs, 4.0), 4.0)


def one_in_three(cases):
    """Cases of which two of three run with `make slow` alone: they differ in what has cases of its own."""
    values = [each if isinstance(each, tuple) else (each,) for each in cases]
    return [pytest.param(*each, marks=[pytest.mark.slow] if i % 3 else []) for i, each in enumerate(values)]


@every_pipeline
@pytest.mark.parametrize("base", one_in_three(BASES))
def test_all_together(compiled, base, pipeline):
    spec = spec_of(base, ALL)
    for seed in range(3):
        check(compiled, spec, pipeline, lengths_of(spec), seed=seed)


ALONE = [(base, list(FIELDS)[number % 4]) for number, base in enumerate(BASES)]
ALONE += [
    (base, name) for base in ("32/32_float32", "8/2_bfloat16", "16/1_bfloat16") for name in FIELDS if name != "all"
]
PAIRS = list(itertools.combinations([name for name in FIELDS if name != "all"], 2))


@every_pipeline
@pytest.mark.parametrize(("base", "name"), one_in_three(dict.fromkeys(ALONE)))
def test_each_alone(compiled, base, name, pipeline):
    spec = spec_of(base, FIELDS[name])
    check(compiled, spec, pipeline, lengths_of(spec))


@pytest.mark.parametrize(("base", "pair"), one_in_three(zip(list(BASES)[::2], PAIRS, strict=False)), ids=str)
def test_pairs(compiled, base, pair):
    spec = spec_of(base, FIELDS[pair[0]] | FIELDS[pair[1]])
    check(compiled, spec, "fused", lengths_of(spec))


WINDOW_CASES = [
    *itertools.product(["32/32_float32", "8/2_bfloat16"], ["fused"], WINDOWS),
    *itertools.product(["32/8_bfloat16_packed", "16/1_one_cache"], ["fused"], (7, 129, 1024)),
    *itertools.product(["32/32_bfloat16_HND", "32/8_bfloat16_packed"], ["staged"], (1, 16, 100, 4096)),
]


@pytest.mark.parametrize(("base", "pipeline", "window"), one_in_three(WINDOW_CASES))
def test_windows(compiled, base, pipeline, window):
    """In sequences that are cut into ranges too, and at every offset of a window's end in a block."""
    spec = spec_of(base, {"window": window})
    lengths = [*lengths_of(spec), *range(max(1, min(window, 6000) - 3), min(window, 6000) + 2 * spec.block_size + 3)]
    check(compiled, spec, pipeline, lengths)


@pytest.mark.parametrize("base", ["32/32_bfloat16_HND", "16/1_float32", "5/1_float32_HND"])
def test_around_the_splits(compiled, base):
    """A window so long that what it leaves is cut into ranges, with sinks, which are to count once."""
    plain = BASES[base]
    for fields in ({"sinks": True, "alibi": True}, {"window": 4096, "sinks": True}):
        spec = dataclasses.replace(plain, **fields)
        check(compiled, spec, "fused", lengths_around_the_splits(spec))
        check(compiled, spec, "fused", [5000, 4095, 4096, 4097, 4096 + 2500])


@every_pipeline
@pytest.mark.parametrize("base", ["32/32_float32", "8/2_float32_sweep", "32/8_bfloat16_packed", "16/1_one_cache"])
def test_poison_before_the_window(compiled, base, pipeline):
    """Whatever the slots and the entries of block_table before it hold, the bits are the same."""
    spec = spec_of(base, ALL)
    module, lengths = compiled(spec, pipeline), lengths_of(spec)
    clean = make_inputs(spec, lengths, poison="none")
    expected = decode(module, clean)
    assert np.isfinite(expected[0].astype(np.float32)).all()
    for poison in POISONS:
        inputs = make_inputs(spec, lengths, poison=poison)
        out, lse = (np.full(each.shape, poison_value(poison, each.dtype)) for each in (inputs.out, inputs.lse))
        module.decode(*inputs.arguments, out=out, lse=lse, **inputs.heads)
        assert_same((out, lse), expected)
    first = np.maximum(clean.context_lens - spec.window, 0) // spec.block_size
    before = np.arange(clean.block_table.shape[1]) < first[:, None]
    assert before.sum() > 100
    for garbage in (-1, np.iinfo(np.int32).min, np.iinfo(np.int32).max, len(clean.key_cache), 0):
        table = np.where(before, garbage, clean.block_table).astype(np.int32)
        assert_same(decode(module, clean.replace(block_table=table)), expected)


def test_block_ids_in_the_window_are_checked(compiled):
    spec = spec_of("8/2_float32_sweep", {"window": 7})  # blocks of 5
    module, inputs = compiled(spec), make_inputs(spec, [23, 12])
    for sequence, entry in ((0, 3), (0, 4), (1, 1), (1, 2)):
        table = inputs.block_table.copy()
        table[sequence, entry] = -1
        with pytest.raises(IndexError, match=f"got -1 for sequence {sequence} at position {entry}"):
            module.decode(*inputs.replace(block_table=table).arguments)


@every_pipeline
@pytest.mark.parametrize("base", ["32/32_bfloat16_HND", "8/2_float32_sweep", "32/8_float32_packed", "16/1_bfloat16"])
def test_the_same_bits(compiled, base, pipeline):
    """Alone and in a batch, and at any number of threads."""
    spec = spec_of(base, ALL)
    module, inputs = compiled(spec, pipeline), make_inputs(spec, lengths_of(spec))
    module.num_threads = 1
    expected = decode(module, inputs)
    for threads in (2, 4, 1):
        module.num_threads = threads
        assert_same(decode(module, inputs), expected)
    for sequence in range(len(inputs.context_lens)):
        alone = decode(module, inputs.take([sequence]))
        assert_same(alone, [each[sequence : sequence + 1] for each in expected])


@every_pipeline
@pytest.mark.parametrize("base", ["32/32_float32", "8/2_bfloat16", "32/8_bfloat16_packed", "16/1_float32"])
def test_what_changes_nothing_gives_the_bits_of_a_plain_module(compiled, base, pipeline):
    """A window that is never reached; slopes of 0, which add 0; sinks of -inf, whose weight is 0."""
    plain, more = BASES[base], dataclasses.replace(BASES[base], window=100_000, alibi=True, sinks=True)
    inputs = make_inputs(plain, LENGTHS)
    expected = decode(compiled(plain, pipeline), inputs)
    heads = {"alibi_slopes": np.zeros(plain.num_heads, np.float32)}
    heads["sinks"] = np.full(plain.num_heads, -np.inf, np.float32)
    assert_same(decode(compiled(more, pipeline), inputs.replace(heads=heads)), expected)
    for name, array in heads.items():
        spec = dataclasses.replace(plain, **{"alibi" if name == "alibi_slopes" else "sinks": True})
        assert_same(decode(compiled(spec, pipeline), inputs.replace(heads={name: array})), expected)
    window = dataclasses.replace(plain, window=max(LENGTHS))
    assert_same(decode(compiled(window, pipeline), inputs), expected)


@every_pipeline
@pytest.mark.parametrize("base", ["32/32_float32", "8/2_bfloat16", "16/1_float32"])
def test_a_soft_cap_saturates(compiled, base, pipeline):
    """Scores of 1e30, of either sign and -inf, are the cap's: all tokens weigh the same, or exp(-2 cap) as much."""
    spec = spec_of(base, {"softcap": 3.0})
    inputs = make_inputs(spec, [1, 40, 700, 2500])
    inputs.query[:] = 0
    inputs.query[..., 0] = 1
    signs = np.random.default_rng(0).choice([-1, 1], inputs.key_cache.shape[:-1]).astype(inputs.key_cache.dtype)
    seen = np.isfinite(inputs.key_cache[..., 0].astype(np.float32))
    inputs.key_cache[..., 0] = np.where(seen, signs, inputs.key_cache[..., 0])
    out, lse = decode(compiled(spec, pipeline), inputs, 1e30)
    assert_close_to_oracle(spec, inputs, out, lse, 1e30)
    assert (lse <= 3 + np.log(inputs.context_lens)[:, None] + 1e-2).all()
    inputs.key_cache[seen & (signs < 0), 0] = -np.inf
    infinite, of_infinite = decode(compiled(spec, pipeline), inputs, 1e30)
    assert_same((infinite, of_infinite), (out, lse))


SINKS = {"zero": 0.0, "ordinary": 1.5, "large": 60.0, "very_large": 1e30, "very_small": -1e30, "none": -np.inf}


@every_pipeline
@pytest.mark.parametrize("sink", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize("base", one_in_three(["32/32_float32", "8/2_bfloat16", "32/8_float16"]))
def test_sinks(compiled, base, sink, pipeline):
    """Of every head, and of every second one. A sequence without tokens has an lse that is the sink."""
    spec = spec_of(base, {"sinks": True})
    module = compiled(spec, pipeline)
    for every in (1, 2):
        inputs = make_inputs(spec, LENGTHS)
        inputs.heads["sinks"][::every] = sink
        out, lse = decode(module, inputs)
        assert_close_to_oracle(spec, inputs, out, lse)
        empty = inputs.context_lens == 0
        assert not out[empty].any()
        expected = np.broadcast_to(inputs.heads["sinks"], lse[empty].shape)
        np.testing.assert_allclose(lse[empty], expected, rtol=1e-6, atol=1e-6)


@every_pipeline
def test_sinks_of_rows_that_see_nothing(compiled, pipeline):
    """All scores -inf, over a whole sequence and over its first tiles."""
    spec = spec_of("8/2_float32_sweep", {"sinks": True, "alibi": True})
    inputs = make_inputs(spec, [1, 17, 300, 2500])
    inputs.query[:], seen = 1, np.isfinite(inputs.key_cache)
    inputs.key_cache[seen] = -np.inf
    out, lse = decode(compiled(spec, pipeline), inputs)
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(inputs.heads["sinks"], lse.shape), rtol=1e-6, atol=1e-6)
    last = inputs.block_table[np.arange(4), -(-inputs.context_lens // spec.block_size) - 1]
    inputs.key_cache[last] = 0.25
    assert_close_to_oracle(spec, inputs, *decode(compiled(spec, pipeline), inputs))


SLOPES = {"0": 0.0, "1": 1.0, "-1": -1.0, "tiny": 2.0**-24, "steep": 100.0, "-0.03": -0.03}


@every_pipeline
@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize(
    "base", one_in_three(["32/32_bfloat16_HND", "8/2_float32_sweep", "32/8_float32_packed", "16/1_bfloat16"])
)
def test_slopes(compiled, base, slope, pipeline):
    """Of one head in three; the others have ALiBi's own. A positive one favours the last tokens."""
    spec = spec_of(base, {"alibi": True})
    inputs = make_inputs(spec, LENGTHS)
    inputs.heads["alibi_slopes"][::3] = slope
    assert_close_to_oracle(spec, inputs, *decode(compiled(spec, pipeline), inputs))


@pytest.mark.parametrize("base", one_in_three(BASES))
def test_verify_passes(compiled, base):
    result = [compiled(spec_of(base, ALL)).verify(seed=1, draw=number) for number in range(12)]
    assert all(each.passed for each in result), [each.failures for each in result]
