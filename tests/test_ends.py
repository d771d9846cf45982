"""Numbers at the ends of their types: huge scores, the largest and the smallest numbers, of every type and layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import lay_out, make_inputs
from specs import DTYPE_SPECS, OUT_DTYPE_SPECS, PIPELINES, SPECS, parametrize
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.verification.comparison import oracle

V3 = {"kind": "llvm", "mcpu": "x86-64-v3"}
MQA = PagedAttentionSpec(16, 1, 32, 16, "bfloat16")

MODULES = {
    **{f"{name}-{pipeline}": (spec, pipeline, "llvm") for name, spec in SPECS.items() for pipeline in PIPELINES},
    "bfloat16_MQA-fused": (MQA, "fused", "llvm"),  # heads in lanes
    # the same without AVX512_BF16, wherever this CPU has it
    **{f"{name}-without": (SPECS[name], "fused", V3) for name in ("bfloat16_HND", "bfloat16_packed")},
    "bfloat16_MQA-without": (MQA, "fused", V3),
}
LENGTHS = [0, 1, 2, 3, 17, 128, 129, 300, 2050, 5000]

LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def module(request, compiled):
    return compiled(*request.param)


def multiplies_pairs(module):
    """Whether it has AVX512_BF16's instruction, which takes subnormal numbers for 0."""
    return "dpbf16ps" in module.sources["asm"]


def decode(module, inputs, scale=None):
    return module.decode(*inputs.arguments, scale, inputs.out, return_lse=True)


def check(module, inputs, scale=None):
    out, lse = decode(module, inputs, scale)
    assert_close_to_oracle(module.spec, inputs, out, lse, scale)
    return out, lse


def fill(cache, numbers):
    """Put numbers in place of all that tokens hold; numbers(how many) draws them."""
    held = np.isfinite(cache)
    cache[held] = numbers(held.sum())


def first_elements(module, lengths, query, key):
    """Inputs whose queries and keys are 0 but in their first element: there a number, and key(tokens of a sequence)."""
    spec = module.spec
    inputs = make_inputs(dataclasses.replace(spec, kv_layout="NHD"), lengths)
    inputs.query[...] = 0
    inputs.query[..., 0] = query
    for sequence, length in enumerate(lengths):
        token = np.arange(length)
        place = inputs.block_table[sequence, token // spec.block_size], token % spec.block_size
        inputs.key_cache[place] = 0
        inputs.key_cache[(*place, slice(None), 0)] = np.asarray(key(length))[:, None]
    caches = lay_out(spec, inputs.key_cache, inputs.value_cache)
    return inputs.replace(key_cache=caches[0], value_cache=caches[1])


SIGNS = {
    "positive": lambda count: np.ones(count),
    "in_turn": lambda count: 1 - 2 * (np.arange(count) % 2),
    "drawn": lambda count: np.random.default_rng(0).choice([-1, 1], count),
}


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("scale", [None, 0.0, 100.0])
@pytest.mark.parametrize("signs", SIGNS.values(), ids=SIGNS)
def test_the_largest_values(module, signs, scale, figure):
    """An average of them is one of the numbers between them, however many there are."""
    inputs = make_inputs(module.spec, LENGTHS)
    fill(inputs.value_cache, lambda count: signs(count) * LARGEST[module.spec.dtype])
    out, _ = check(module, inputs, scale)
    assert np.isfinite(out.astype(np.float32)).all()
    figure("sequences of extreme values", len(LENGTHS))


@pytest.mark.parametrize("name", [name for name, spec in OUT_DTYPE_SPECS.items() if spec.wide_range])
def test_averages_beyond_the_type_of_out_are_infinite(compiled, name):
    """As when they are converted, and only then."""
    spec = OUT_DTYPE_SPECS[name]
    inputs = make_inputs(spec, [1, 16, 3000])
    within, beyond = {"float16": (6e4, 7e4), "bfloat16": (3.3e38, 3.4e38)}[spec.result_dtype]
    inputs.value_cache[..., ::2] = within
    inputs.value_cache[..., 1::2] = -beyond
    out, _ = decode(compiled(spec), inputs)
    np.testing.assert_allclose(out[..., ::2].astype(np.float64), within, rtol=0.01)
    assert np.isneginf(out[..., 1::2].astype(np.float32)).all()


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("negative", [False, True])
def test_powers_of_two_go_from_queries_and_keys_to_the_scale(module, negative, figure):
    """So that products would overflow, or vanish, if the scale came after them: the same bits."""
    wide = [(66, 63), (120, -100), (-30, 90), (100, 20), (-60, -15), (-20, -30), (0, 90)]
    scale = -0.3 if negative else 0.3
    inputs = make_inputs(module.spec, LENGTHS)
    expected = check(module, inputs, scale)
    for query, key in wide if module.spec.wide_range else [(8, 9), (0, 15), (10, -2)]:
        moved = inputs.replace(query=inputs.query * inputs.query.dtype.type(2.0**query))
        moved = moved.replace(key_cache=inputs.key_cache * inputs.key_cache.dtype.type(2.0**key))
        if module.spec.wide_range or key >= 0:
            for actual, same in zip(decode(module, moved, scale * 2.0 ** -(query + key)), expected, strict=True):
                assert_same_bits(actual, same)
            figure("sequences of extreme scores", len(LENGTHS))


@pytest.mark.scorecard(8)
@pytest.mark.parametrize(
    ("query", "key", "scale"),
    [
        (1e20, 1e19, 1e-30), (1e20, 1e19, 1e-39), (1e20, 1e19, -1e-38), (3e38, 1e37, 1e-38), (1e38, 1e7, 1e-45),
        (1e38, 1e22, 1e-60), (1e38, 1e38, 0.0), (1e38, 1e38, -0.0), (1e-10, 1e-20, 1e30), (1e-10, 1e-20, 3e38),
    ],
)  # fmt: skip
def test_products_beyond_the_scores(module, query, key, scale, figure):
    """Queries times keys are far above the scores, or far below: what counts is that scores are ordinary numbers."""
    if not module.spec.wide_range:
        query, key, scale = 60000.0, 60000.0, scale * (query / 60000) * (key / 60000)
    rng = np.random.default_rng(0)
    check(module, first_elements(module, LENGTHS, query, lambda length: rng.uniform(-1, 1, length) * key), scale)
    figure("sequences of extreme scores", len(LENGTHS))


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("scale", [1e5, -1e5, 1e30, -1e30])
def test_huge_scores_pick_one_token(module, scale, figure):
    """Scores up to 5e31, further apart than exp can see: softmax is one-hot, out one token's value, in every bit."""
    rng = np.random.default_rng(1)
    chosen = {length: int(rng.integers(0, length)) for length in LENGTHS[1:]}

    def keys(length):
        key = rng.integers(-100, 100, length) * np.sign(scale)
        key[chosen[length] if length else slice(0)] = 101 * np.sign(scale)
        return key

    inputs = first_elements(module, LENGTHS, 0.5, keys)
    out, lse = decode(module, inputs, scale)
    for sequence, length in enumerate(LENGTHS):
        if length:
            value = token_value(module.spec, inputs, sequence, chosen[length]).repeat(module.spec.group, axis=0)
            assert_same_bits(out[sequence], value.astype(out.dtype))
    assert np.isfinite(lse[1:]).all()
    figure("sequences of extreme scores", len(LENGTHS))


def token_value(spec, inputs, sequence, token):
    """The value of a token, [num_kv_heads, head_dim]."""
    block, slot = inputs.block_table[sequence, token // spec.block_size], token % spec.block_size
    block = inputs.value_cache[block]
    if spec.kv_layout == "NHD":
        return block[slot]
    pair = spec.packed_pair if spec.kv_layout == "packed" else 1
    return block[:, slot // pair, slot % pair :: pair]


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("score", [-5e5, 5e5, -2e30, -1e30, 1e30, -1e38, 1e38, -1e-40, 1e-40])
def test_equal_scores_weigh_equally(module, score, figure):
    """Below the -1e30 that stands for "no score yet" too: these are scores like any other."""
    lengths = [0, 1, 4, 8, 16, 64, 128, 1024, 4096]
    inputs = first_elements(module, lengths, 1, np.ones)
    fill(inputs.value_cache, lambda count: np.full(count, 0.5))
    out, _ = check(module, inputs, score)
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
    check(compiled(spec, pipeline), inputs, 1.0)


@pytest.mark.scorecard(8)
def test_subnormal_values_are_not_flushed(module, figure):
    """But by AVX512_BF16's instruction, whatever the state of the floating-point unit."""
    spec = module.spec
    inputs = make_inputs(spec, [1, 1])
    fill(inputs.value_cache, lambda count: np.full(count, SMALLEST[spec.dtype]))
    out, _ = decode(module, inputs)
    np.testing.assert_array_equal(out.astype(np.float64), 0 if multiplies_pairs(module) else SMALLEST[spec.dtype])
    figure("sequences of extreme values", 2)


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_subnormal_queries_are_not_flushed(module, scale, figure):
    """But by AVX512_BF16's instruction: every token weighs the same then."""
    query, key = (2.0**-24, 60000.0) if module.spec.dtype == "float16" else (1.1e-38, 3e38)
    inputs = first_elements(module, [2, 5, 40], query, lambda length: key * (np.arange(length) % 3 == 0))
    if multiplies_pairs(module):
        out, lse = decode(module, inputs, scale)
        assert_close_to_oracle(module.spec, inputs.replace(query=np.zeros_like(inputs.query)), out, lse, scale)
    else:
        check(module, inputs, scale)
    figure("sequences of extreme scores", 3)


@pytest.mark.scorecard(8)
@pytest.mark.parametrize("power", [-60, -95, -105, -115, -125])
def test_small_values_are_rounded_to_steps(module, power, figure):
    """N tokens leave a step of N * N * 2**-147, or, of AVX512_BF16's instruction, of N * N * 2**-123."""
    spec, lengths = module.spec, [1, 2, 17, 130, 2050, 5000]
    power = power if spec.wide_range else power // 8
    inputs = make_inputs(spec, lengths)
    rng = np.random.default_rng(0)
    fill(inputs.value_cache, lambda count: rng.uniform(-1, 1, count) * 2.0**power)
    inputs.query[...] *= 8
    out, _ = decode(module, inputs, 1.0)
    expected, bound = oracle(spec, *inputs.arguments, 1.0, spec.kv_layout)["out"]
    step = 2.0 ** (-123 if multiplies_pairs(module) else -147) * np.square(lengths, dtype=np.float64)
    allowed = bound + step[:, None, None] + SMALLEST[spec.result_dtype]
    assert (np.abs(out.astype(np.float64) - expected) <= allowed).all()
    figure("sequences of extreme values", len(lengths))
