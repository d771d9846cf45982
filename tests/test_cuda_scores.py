"""Windows, soft caps, ALiBi and sinks in the CUDA kernels on the emulator, against the float64 reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_kernels import build_staged, on_device, shared
from inputs import POISONS, make_inputs
from specs import in_turn
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import tiling as cuda_tiling

BASES = {
    "mma": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "mma_in_tiles": PagedAttentionSpec(25, 1, 16, 1, "float16", "float32"),
    "mma_hnd": PagedAttentionSpec(12, 1, 96, 5, "float16", kv_layout="HND"),
    "fma": PagedAttentionSpec(4, 2, 64, 16, "float32"),
    "fma_in_tiles": PagedAttentionSpec(5, 1, 48, 7, "float32", out_dtype="bfloat16"),
    "fma_16_bits": PagedAttentionSpec(2, 2, 80, 32, "bfloat16", kv_layout="HND"),
    "one_cache": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=48, shared_kv=True),
}
"""Every strategy, with tiles of heads of which the last is short, and blocks that no tile is a multiple of."""

FIELDS = {
    "window": {"window": 100},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 1.5, "alibi": True, "sinks": True},
}
ALL = FIELDS["all"]

LENGTHS = (0, 1, 15, 16, 17, 99, 100, 101, 116, 163, 164, 165, 0, 300, 700)

every_base = pytest.mark.parametrize("base", BASES)
one_of_each_strategy = pytest.mark.parametrize("base", ["mma", "fma"])


def spec_of(base, fields):
    return dataclasses.replace(BASES[base], **fields)


def inputs_of(spec, lengths, **more):
    return shared(spec, on_device(make_inputs(spec, lengths, **more)))


def check(kernels, spec, lengths, workers=8, scale=4.0, **more):
    """With a scale that makes some scores larger than the soft cap."""
    inputs = inputs_of(spec, lengths, **more)
    assert_close_to_oracle(spec, inputs, *kernels.decode(inputs, workers=workers, scale=scale), scale)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@every_base
@pytest.mark.parametrize("workers", [1, 8])
def test_all_together(cuda_decode, base, workers):
    spec = spec_of(base, ALL)
    check(cuda_decode(spec), spec, LENGTHS, workers)


@one_of_each_strategy
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "all"])
def test_each_alone(cuda_decode, base, name):
    spec = spec_of(base, FIELDS[name])
    check(cuda_decode(spec), spec, LENGTHS)


@one_of_each_strategy
@pytest.mark.parametrize("window", [1, 7, 16, 129, 600])
def test_windows(cuda_decode, base, window):
    """At every offset of a window's end in a block, and where what is left is cut into ranges."""
    spec = spec_of(base, {"window": window})
    near = range(max(1, window - 1), window + 2 * spec.block_size + 2)
    for workers in (1, 30):
        check(cuda_decode(spec), spec, [1500, 0, 1, 700, *near], workers)


@one_of_each_strategy
def test_sequences_are_cut_as_explain_counts(cuda_decode, base):
    spec = spec_of(base, {"window": 600})
    kernels, lengths = cuda_decode(spec), [1000, 3, 0, 513, 256, 5000, 601]
    arguments = kernels.arguments(inputs_of(spec, lengths), workers=3)
    kernels.launch("cuda_decode", arguments)
    counts = np.array(cuda_tiling.ranges(spec, kernels.tiling, lengths))
    assert counts.tolist() == [3, 1, 1, 3, 1, 3, 3]
    expected = (np.arange(len(arguments["partial_max"]))[:, None] < counts) & (counts > 1)
    np.testing.assert_array_equal(~np.isnan(arguments["partial_max"]).any(axis=2), expected)


@pytest.mark.parametrize("base", ["mma", "mma_hnd", "fma", "one_cache"])
def test_poison_before_the_window(cuda_decode, base):
    """Whatever the slots and the entries of block_table before it hold, the bits are the same."""
    spec = spec_of(base, ALL)
    kernels, lengths = cuda_decode(spec), [1, 99, 100, 101, 117, 300, 700]
    clean = inputs_of(spec, lengths, poison="none")
    expected = kernels.decode(clean)
    assert np.isfinite(expected[0].astype(np.float32)).all()
    for poison in POISONS:
        assert_same(kernels.decode(inputs_of(spec, lengths, poison=poison)), expected)
    first = np.maximum(clean.context_lens - spec.window, 0) // spec.block_size
    before = np.arange(clean.block_table.shape[1]) < first[:, None]
    assert before.any()
    for garbage in (-1, np.iinfo(np.int32).max, 0):
        table = np.where(before, garbage, clean.block_table).astype(np.int32)
        assert_same(kernels.decode(clean.replace(block_table=table)), expected)


@one_of_each_strategy
def test_what_changes_nothing_gives_the_bits_of_plain_kernels(cuda_decode, base):
    """A window that is never reached; slopes of 0, which add 0; sinks of -inf, whose weight is 0."""
    plain, lengths = BASES[base], [0, 1, 100, 700]
    inputs = inputs_of(plain, lengths)
    expected = cuda_decode(plain).decode(inputs, workers=3)
    heads = {"alibi_slopes": np.zeros(plain.num_heads, np.float32)}
    heads["sinks"] = np.full(plain.num_heads, -np.inf, np.float32)
    more = dataclasses.replace(plain, window=100_000, alibi=True, sinks=True)
    assert_same(cuda_decode(more).decode(inputs.replace(heads=heads), workers=3), expected)


@one_of_each_strategy
def test_a_soft_cap_saturates(cuda_decode, base):
    """Scores of 1e30, of either sign and -inf, are the cap's."""
    spec = spec_of(base, {"softcap": 3.0})
    inputs = inputs_of(spec, [1, 40, 700])
    inputs.query[:] = 0
    inputs.query[..., 0] = 1
    signs = np.random.default_rng(0).choice([-1, 1], inputs.key_cache.shape[:-1]).astype(inputs.key_cache.dtype)
    seen = np.isfinite(inputs.key_cache[..., 0].astype(np.float32))
    inputs.key_cache[..., 0] = np.where(seen, signs, inputs.key_cache[..., 0])
    expected = cuda_decode(spec).decode(inputs, scale=1e30)
    assert_close_to_oracle(spec, inputs, *expected, 1e30)
    inputs.key_cache[seen & (signs < 0), 0] = -np.inf
    assert_same(cuda_decode(spec).decode(inputs, scale=1e30), expected)


SINKS = {"zero": 0.0, "large": 60.0, "very_large": 1e30, "very_small": -1e30, "none": -np.inf}


@one_of_each_strategy
@pytest.mark.parametrize("sink", SINKS.values(), ids=SINKS)
def test_sinks(cuda_decode, base, sink):
    """Of every head, and of every second one; in whole sequences and in ranges, where they count once."""
    spec = spec_of(base, {"sinks": True})
    for every, workers in ((1, 1), (2, 8)):
        inputs = inputs_of(spec, [0, 1, 17, 300, 1000])
        inputs.heads["sinks"][::every] = sink
        out, lse = cuda_decode(spec).decode(inputs, workers=workers)
        assert_close_to_oracle(spec, inputs, out, lse)
        assert not out[0].any()
        np.testing.assert_array_equal(lse[0], inputs.heads["sinks"])


@one_of_each_strategy
def test_sinks_of_rows_that_see_nothing(cuda_decode, base):
    """All scores -inf: out is 0, and lse the sink."""
    spec = spec_of(base, {"sinks": True, "alibi": True})
    inputs = inputs_of(spec, [1, 17, 700])
    inputs.query[:] = 1
    inputs.key_cache[np.isfinite(inputs.key_cache)] = -np.inf
    out, lse = cuda_decode(spec).decode(inputs)
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(inputs.heads["sinks"], lse.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", ["mma_in_tiles", "fma_in_tiles"])
def test_slopes_and_sinks_with_strides(cuda_decode, base):
    """NaN beside each is not read, nor what lies after them for the rows that pad a tile: the emulator would say so."""
    spec = spec_of(base, {"alibi": True, "sinks": True})
    inputs = inputs_of(spec, [300, 5])
    expected = cuda_decode(spec).decode(inputs)
    apart = {name: np.full((len(array), 3), np.nan, np.float32) for name, array in inputs.heads.items()}
    for name, array in inputs.heads.items():
        apart[name][:, 1] = array
    strided = inputs.replace(heads={name: array[:, 1] for name, array in apart.items()})
    assert_same(cuda_decode(spec).decode(strided), expected)


@pytest.mark.parametrize("slope", [0.0, 1.0, -1.0, 2.0**-24, 100.0])
def test_slopes(cuda_decode, slope):
    """Of one head in three; the others have ALiBi's own. A positive one favours the last tokens."""
    spec = spec_of("mma_hnd", {"alibi": True})
    inputs = inputs_of(spec, LENGTHS)
    inputs.heads["alibi_slopes"][::3] = slope
    assert_close_to_oracle(spec, inputs, *cuda_decode(spec).decode(inputs))


@in_turn(("name", "base"), FIELDS, ["mma", "fma_in_tiles", "one_cache"])
def test_staged(emulated, base, name):
    """The CPU's stages with a thread for a score: the same fields by other code."""
    spec = spec_of(base, FIELDS[name])
    kernels = build_staged(emulated, spec)
    for poison in ("nan", "inf"):
        inputs = inputs_of(spec, (0, 1, 101, 16, 163), poison=poison)
        assert_close_to_oracle(spec, inputs, *kernels.decode(inputs, 4.0), 4.0)
