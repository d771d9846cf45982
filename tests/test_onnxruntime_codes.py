"""onnxruntime's GroupQueryAttention on codes of int8 and int4, on its CPU: a second opinion on what our codes mean.

Its caches have one scale each (PER_TENSOR), or one for each channel of a kv head (PER_CHANNEL), which the caller gives;
a code of int4 is q + 8 with q from -8 to 7, the element with the even place in the lower half of a byte. So its bytes
are those of our caches of kv_dtype int8 whose scales are all that one, and of int4 with kv_rotation "none", that scale
and the zero point -8 times it. A channel's scales are multiplied into queries and out, and ours are 1 then.

Both read the same bytes. Each is compared with float64, ours by the project's table and its by a bound on its float32,
and one with the other by the sum of both. It has scores for the lse that it does not return. What it makes of new
tokens is compared with append_kv byte for byte.

What cannot agree:

- A scale for each token, so all that append_kv makes of ordinary rows: it has none. Rows here have that one scale.
- Rotated caches: it has no rotation.
- Code -128, which it writes of numbers from -127.5 scales on; append_kv has none beyond 127 scales. Both read it.
- Numbers within rounding of a tie, where the scale is no power of two: it multiplies by the inverse of the scale,
  append_kv divides. New tokens of bfloat16: its CPU has float32 and float16. bfloat16 of ours gets float32 from it,
  of numbers that bfloat16 has.
- A scale for each channel in bfloat16 and float16, unless a query times it is a number of that type: here it is.
- Keys and values of different kinds, which both refuse, and an odd head_dim of int4, which we do.
- Several query tokens of several sequences without causality: it takes one sequence then.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import DTYPES
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.codes import elements, in_bytes
from pa_compiler.verification.comparison import compare, oracle
from pa_compiler.verification.inputs import noise

pytest.importorskip("onnx", reason="onnx is not installed: no model of one operator is made")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: its caches of codes are not compared with")

from onnxruntime_gqa import EXP_ERROR, Step, score_bound, session

INT8, INT4 = {"kv_dtype": "int8"}, {"kv_dtype": "int4", "kv_rotation": "none"}
PACKED = {"kv_layout": "packed"}

SPECS = {
    "int8": PagedAttentionSpec(4, 4, 64, 16, "float32", **INT8),
    "int8_packed": PagedAttentionSpec(8, 2, 128, 16, "float32", **PACKED, **INT8),
    "int8_MQA_bfloat16": PagedAttentionSpec(16, 1, 64, 32, "bfloat16", **INT8),
    "int8_HND_float16": PagedAttentionSpec(8, 2, 24, 5, "float16", kv_layout="HND", **INT8),
    "int8_packed_bfloat16": PagedAttentionSpec(16, 1, 64, 16, "bfloat16", **PACKED, **INT8),
    "int8_window_sinks": PagedAttentionSpec(8, 2, 32, 8, "float32", window=70, sinks=True, **INT8),
    "int4": PagedAttentionSpec(8, 2, 64, 16, "float32", **INT4),
    "int4_packed": PagedAttentionSpec(16, 1, 128, 16, "float32", **PACKED, **INT4),
    "int4_MHA_bfloat16": PagedAttentionSpec(4, 4, 64, 8, "bfloat16", **INT4),
    "int4_HND_float16": PagedAttentionSpec(16, 1, 24, 5, "float16", kv_layout="HND", **INT4),
    "int4_packed_bfloat16": PagedAttentionSpec(8, 2, 64, 32, "bfloat16", **PACKED, **INT4),
    "int4_packed_window_sinks": PagedAttentionSpec(3, 3, 32, 16, "float32", window=70, sinks=True, **PACKED, **INT4),
}
"""Groups of 1, 4 and 16, every layout and dtype, and what is not about codes together with them once."""

ATTEND = ["int8", "int8_packed_bfloat16", "int8_window_sinks", "int4_HND_float16", "int4_packed", "int4_MHA_bfloat16"]
every_spec = pytest.mark.parametrize("name", SPECS)

LENGTHS = {"of one length": [300, 300, 300], "ragged": [1, 33, 700, 128, 16]}
SCALES = {"int8": (0.7 / 127, 1.3 / 127), "int4": (0.7 / 8, 1.3 / 8)}


def drawn(spec, context_lens, counts, *, seed=0, room=0, **fields) -> Step:
    """A step with any bytes in its past, and in what is not past yet."""
    rng = np.random.default_rng(seed)
    context_lens, counts = (np.array(each, np.int32) for each in (context_lens, counts))
    dtype = DTYPES["float16" if spec.dtype == "float16" else "float32"]
    batch, tokens = len(counts), counts.max()

    def numbers(heads, half):
        exact = noise(rng, (batch, tokens, heads, spec.head_dim), half, DTYPES[spec.dtype])
        return exact.astype(dtype)

    shape = (batch, spec.num_kv_heads, context_lens.max() + room, spec.head_dim // spec.codes_of_byte)
    past = tuple(
        rng.integers(0, 256, shape, np.uint8).view("int8" if spec.kv_dtype == "int8" else "uint8") for _ in range(2)
    )
    new = numbers(spec.num_kv_heads, 0.7), numbers(spec.num_kv_heads, 1.3)
    scales = tuple(np.array([scale], np.float32) for scale in SCALES[spec.kv_dtype])
    if spec.sinks:
        fields["sinks"] = rng.standard_normal(spec.num_heads).astype(np.float32)
    step = Step(spec, numbers(spec.num_heads, 2.0), new, past, context_lens, counts, scales)
    return dataclasses.replace(step, **fields)


def assert_the_past_is_kept(step, present):
    for before, after in zip(step.past, present, strict=True):
        for sequence, past in enumerate(step.context_lens - step.counts):
            assert_same_bits(after[sequence, :, :past], before[sequence, :, :past])


def assert_all_agree(step, inputs, present, ours, theirs, **options):
    """Ours with float64, its own with float64, and both with each other."""
    found = oracle(step.spec, *inputs.arguments, None, step.spec.kv_layout, **inputs.heads, **options)["out"]
    ours, expected, bound = (each.astype(np.float64) * step.of_channels(1) for each in (ours, *found))
    check_all("out", (ours, bound), (step.rows(theirs), step.bound(present)), expected, step)


def check_all(name, ours, theirs, expected, step):
    """ours and theirs: results with their bounds."""
    both = ours[0], theirs[0].astype(np.float64), ours[1] + theirs[1]
    for of, found, near, within in (
        ("ours", ours[0], expected, ours[1]),
        ("its", theirs[0], expected, theirs[1]),
        ("ours beside its", *both),
    ):
        _, wrong = compare(f"{name}, {of}", found, near, within, np.repeat(step.context_lens, step.counts))
        assert not wrong, wrong


@pytest.fixture
def module(compiled):
    """module(name) -> the module of a spec, the same for all tests."""
    return lambda name: compiled(SPECS[name], attend=name in ATTEND)


@pytest.mark.parametrize("context_lens", LENGTHS.values(), ids=LENGTHS)
@every_spec
def test_decode(module, name, context_lens):
    step = drawn(SPECS[name], context_lens, [1] * len(context_lens))
    theirs, *present = step.run()
    assert_the_past_is_kept(step, present)
    inputs = step.inputs(present)
    ours = module(name).decode(*inputs.arguments, **inputs.heads)
    assert_all_agree(step, inputs, present, ours, theirs)


@pytest.mark.parametrize("name", ["int8", "int8_packed", "int4", "int4_packed"])
def test_lse(module, name):
    step = drawn(SPECS[name], LENGTHS["ragged"], [1] * 5, seed=6)
    *_, keys, values, scores = step.run(scores=True)
    inputs = step.inputs((keys, values))
    _, ours = module(name).decode(*inputs.arguments, return_lse=True, **inputs.heads)
    expected, bound = oracle(step.spec, *inputs.arguments, None, step.spec.kv_layout, **inputs.heads)["lse"]
    seen = np.arange(scores.shape[-1]) < step.context_lens[:, None, None]
    theirs = np.logaddexp.reduce(np.where(seen, scores[:, :, 0].astype(np.float64), -np.inf), axis=-1)
    largest_key = {"int8": 128, "int4": 8}[step.spec.kv_dtype] * step.scales[0].item()
    magnitudes = np.abs(inputs.query).sum(axis=-1) * largest_key / np.sqrt(step.spec.head_dim)
    check_all("lse", (ours, bound), (theirs, score_bound(step.spec.head_dim, magnitudes)), expected, step)


@pytest.mark.parametrize("name", ATTEND)
def test_attend_to_prompts_chunks_and_single_tokens_together(module, name):
    context_lens, counts = [40, 20, 300, 129, 2], [1, 20, 3, 16, 2]
    step = drawn(SPECS[name], context_lens, counts, seed=1, room=20)
    theirs, *present = step.run()
    assert_the_past_is_kept(step, present)
    inputs, starts = step.inputs(present), np.cumsum([0, *counts])
    ours = module(name).attend(*inputs.arguments, starts, **inputs.heads)
    assert_all_agree(step, inputs, present, ours, theirs, query_start_loc=starts)


@pytest.mark.parametrize("name", ["int8_packed_bfloat16", "int4_packed"])
def test_attend_without_causality(module, name):
    step = drawn(SPECS[name], [200], [9], seed=2, causal=False)
    theirs, *present = step.run()
    inputs, starts = step.inputs(present), np.array([0, 9])
    ours = module(name).attend(*inputs.arguments, starts, causal=False, **inputs.heads)
    assert_all_agree(step, inputs, present, ours, theirs, query_start_loc=starts, causal=False)


BITS = {"float32": (8, 16), "float16": (5, 6), "bfloat16": (4, 4)}
"""Of a query's element and of a channel's scale: their product has no more than dtype."""


def in_bits(numbers, bits):
    mantissa, exponent = np.frexp(numbers)
    return np.ldexp(np.rint(mantissa * 2.0**bits), exponent - bits)


@pytest.mark.parametrize(
    "name", ["int8_packed", "int8_HND_float16", "int8_MQA_bfloat16", "int4", "int4_packed_bfloat16"]
)
def test_decode_with_a_scale_for_each_channel(module, name):
    spec, rng = SPECS[name], np.random.default_rng(3)
    step = drawn(spec, LENGTHS["ragged"], [1] * 5, seed=3)
    of_query, of_scale = BITS[spec.dtype]
    drawn_query = rng.uniform(0.25, 2, step.query.shape) * rng.choice([-1, 1], step.query.shape)
    shape = (1, spec.num_kv_heads, 1, spec.head_dim)
    scales = tuple(
        in_bits(rng.uniform(0.5, 2, shape) * scale, of_scale).astype(np.float32) for scale in SCALES[spec.kv_dtype]
    )
    step = dataclasses.replace(step, query=in_bits(drawn_query, of_query).astype(step.query.dtype), scales=scales)
    theirs, *present = step.run()
    inputs = step.inputs(present)
    exact = step.rows(step.query).astype(np.float64) * step.of_channels(0)
    np.testing.assert_array_equal(inputs.query.astype(np.float64), exact)
    assert_all_agree(step, inputs, present, module(name).decode(*inputs.arguments, **inputs.heads), theirs)


def rows_of_scale(rng, spec, shape, scale, *, ties):
    """Rows whose scale is this one: the largest number has code 127 or -127, or the least and largest 0 and 15.

    The others are anywhere between, or no nearer to a tie than a tenth of a scale.
    """
    least, largest = (-127, 127) if spec.kv_dtype == "int8" else (-8, 7)
    offsets = rng.choice([-0.5, 0.0, 0.5], shape) if ties else rng.uniform(-0.4, 0.4, shape)
    units = np.clip(rng.integers(least, largest, shape, endpoint=True) + offsets, least, largest)
    places = rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)
    np.put_along_axis(units, places[..., :1], rng.choice([least, largest], (*shape[:-1], 1)), axis=-1)
    if spec.kv_dtype == "int4":
        np.put_along_axis(units, places[..., :2], [[[[least, largest]]]], axis=-1)
    return units * scale


APPENDED = [
    *(pytest.param(name, (2.0**-7, 2.0**-5), True, id=f"{name}-ties") for name in SPECS if "sinks" not in name),
    *((name, (0.0123, 0.0456), False) for name in ("int8", "int8_packed", "int4", "int4_packed")),
]


@pytest.mark.parametrize(("name", "scales", "ties"), APPENDED)
def test_new_tokens_have_the_same_codes(module, name, scales, ties):
    """Ties too, to the even, where a scale is a power of two. Ours has the scale by itself, and the zero point."""
    spec, rng, counts = SPECS[name], np.random.default_rng(4), [97, 3, 100]
    step = drawn(spec, [140, 163, 100], counts, seed=4, room=100)
    scales = [in_bits(scale, 16).astype(np.float32) for scale in scales]
    new = [rows_of_scale(rng, spec, step.new[0].shape, scale, ties=ties).astype(step.new[0].dtype) for scale in scales]
    step = dataclasses.replace(step, new=tuple(new), scales=tuple(scale.reshape(1) for scale in scales))
    _, *present = step.run()
    count, module = sum(counts), module(name)
    blocks = -(-count // spec.block_size)
    caches, of_tokens = module.empty_cache(blocks), module.empty_scales(blocks)
    rows = [step.rows(each).astype(DTYPES[spec.dtype]) for each in new]
    for ours, theirs in zip(rows, new, strict=True):
        np.testing.assert_array_equal(ours.astype(np.float64), step.rows(theirs).astype(np.float64))
    names = ("key_scale", "value_scale")
    module.append_kv(*rows, *caches, np.arange(count), **dict(zip(names, of_tokens, strict=True)))
    caches = pa_compiler.convert_cache(*caches, spec.kv_layout, "NHD")
    for ours, made, theirs, scale in zip(caches, of_tokens, present, scales, strict=True):
        lengths = zip(theirs, step.context_lens, counts, strict=True)
        expected = np.concatenate([each[:, length - added : length].swapaxes(0, 1) for each, length, added in lengths])
        assert len(np.unique(elements(expected))) == (255 if spec.kv_dtype == "int8" else 16)
        assert_same_bits(ours.reshape(-1, *ours.shape[2:])[:count], expected)
        made = made.swapaxes(1, 2).reshape(-1, *made.shape[1:2], *made.shape[3:])[:count]
        unit = [scale, -8 * scale] if spec.has_zeros else scale
        assert_same_bits(made, np.broadcast_to(np.float32(unit), made.shape))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_it_makes_of_numbers_beyond_its_scale(name):
    """The nearest code that there is: of int8 one more below 0 than append_kv has."""
    spec = SPECS[name]
    step = drawn(spec, [1], [1])
    units = np.resize(np.float32([-1e9, -128.5, -128, -127.5, -9, -8.5, -8, 7, 7.5, 127.5, 128, 1e9]), spec.head_dim)
    new = np.broadcast_to(units, step.new[0].shape) * np.float32(0.5)
    step = dataclasses.replace(step, new=(new, new), scales=(np.float32([0.5]),) * 2)
    _, keys, values = step.run()
    if spec.kv_dtype == "int8":
        expected = np.clip(np.rint(units), -128, 127).astype(np.int8)
    else:
        expected = in_bytes((np.clip(np.rint(units), -8, 7) + 8).astype(np.uint8))
    for found in (keys, values):
        assert_same_bits(found, np.broadcast_to(expected, found.shape))


def test_exp_is_as_near_as_the_bound_has_it():
    """Of the differences that weights are made of, down to where float32 has them in full."""
    numbers = -np.random.default_rng(5).uniform(0, 87, 1 << 20).astype(np.float32)
    (found,) = session((("x", "float32"),), (("y", "float32"),), "Exp", "").run(None, {"x": numbers})
    exact = np.exp(numbers.astype(np.float64))
    assert np.abs(found / exact - 1).max() <= EXP_ERROR
