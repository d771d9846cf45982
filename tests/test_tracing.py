"""Functions of scores and masks that are called with stand-ins: what they compute, as terms and as texts."""

from __future__ import annotations

import functools
import operator
import random

import numpy
import pytest
from terms import term_value, text_value

from pa_compiler.ranges import inside, interval
from pa_compiler.score import Input, names_read, parts
from pa_compiler.tracing import trace

HEADS = 8
BIAS = Input("bias", "float16", (HEADS, 64))
FLAGS = Input("flags", "bool", ("batch", 64))
GROUPS = Input("groups", "int32", (HEADS,))
SCALE = Input("scale", "float32", ())
INPUTS = (BIAS, FLAGS, GROUPS, SCALE)


def traced(function, field="score_mod", inputs=INPUTS):
    return trace(field, function, inputs, num_heads=HEADS)


@functools.cache
def arguments():
    """Random arguments of 400 scores, as the reference has them, and the arrays of INPUTS."""
    drawn = numpy.random.default_rng(5)
    query = drawn.integers(0, 64, 400)
    values = {
        "score": numpy.where(drawn.random(400) < 0.1, numpy.round(drawn.normal(0, 3, 400)), drawn.normal(0, 3, 400)),
        "batch": drawn.integers(0, 3, 400),
        "head": drawn.integers(0, HEADS, 400),
        "query_pos": query,
        "key_pos": drawn.integers(0, query + 1),
    }
    arrays = {
        "bias": drawn.normal(0, 1, (HEADS, 64)).astype(numpy.float16).astype(numpy.float64),
        "flags": drawn.random((3, 64)) < 0.5,
        "groups": drawn.integers(0, 4, HEADS),
        "scale": numpy.float64(0.75),
    }
    return values, arrays


def agree(function, field="score_mod"):
    """That a function, its term and its text compute the same."""
    values, arrays = arguments()
    result = traced(function, field)
    taken = {each: arrays[each] for each in names_read(result.result)}
    given = list(values.values())[field == "mask_mod" :]
    with numpy.errstate(all="ignore"):
        expected = numpy.broadcast_to(function(*given, **taken), 400)
        by_term = term_value(result.result, values, arrays)
        by_text = text_value(result.text, values, arrays)
    for found in (by_term, by_text):
        numpy.testing.assert_allclose(numpy.broadcast_to(found, 400), expected, rtol=1e-6, atol=1e-6)
    return result


SCORE_MODS = {
    "unchanged": lambda s, b, h, q, k: s,
    "constant": lambda s, b, h, q, k: 3,
    "position": lambda s, b, h, q, k: k,
    "causal": lambda s, b, h, q, k: numpy.where(q >= k, s, -numpy.inf),
    "alibi": lambda s, b, h, q, k: s + 2.0 ** (-8.0 * (h + 1) / HEADS) * (k - q),
    "alibi_exp2": lambda s, b, h, q, k: s - numpy.exp2(-((h + 1) * 8.0 / HEADS)) * abs(q - k),
    "softcap": lambda s, b, h, q, k: 20 * numpy.tanh(s / 20),
    "decay": lambda s, b, h, q, k: s * numpy.exp(-(q - k) / 16) + numpy.log(1 + (q - k)),
    "numbers_of_numpy": lambda s, b, h, q, k: numpy.float32(2) * s - numpy.int64(3) + numpy.array(0.5) / (1 + h),
    "whole": lambda s, b, h, q, k: (q - k) // 3 % 5 - (k * 7 + b) % -4 + (-k // 5) + (q << 2) - (k >> 1),
    "fractions": lambda s, b, h, q, k: s // 0.75 + s % 1.5 + (s * 2) % -0.7 + 1 // (2 + abs(s)),
    "bits": lambda s, b, h, q, k: (q & 7) + (k | 3) - (q ^ k) + ~h,
    "rounding": lambda s, b, h, q, k: numpy.floor(s) + 10 * numpy.ceil(s) + 100 * numpy.trunc(s) + 1e3 * numpy.rint(s),
    "halves": lambda s, b, h, q, k: numpy.round((q - k) / 2) + numpy.rint(k * 0.5 - 10),
    "powers": lambda s, b, h, q, k: s**2 + s**3 - (q - k) ** 2 + numpy.abs(s) ** 0.5 + (1 + h) ** -0.5 + s**0 + s**-1.0,
    "bases": lambda s, b, h, q, k: 1.5**s + 2**s + 0.5**h,
    "squares": lambda s, b, h, q, k: numpy.square(s) + numpy.sqrt(numpy.abs(s)) + numpy.reciprocal(s + 20),
    "logs": lambda s, b, h, q, k: numpy.log2(1 + numpy.abs(s)) + numpy.log10(k + 1),
    "signs": lambda s, b, h, q, k: numpy.sign(s) + numpy.sign(k - 3) - -s + +s + numpy.fabs(s) + numpy.negative(k),
    "clip": lambda s, b, h, q, k: numpy.clip(s, -1, 1) + numpy.clip(q - k, 2, None) + numpy.clip(s, -h, a_max=h),
    "least": lambda s, b, h, q, k: numpy.minimum(s, q - k) + numpy.maximum(h, 2) + numpy.maximum(1.5, h),
    "casts": lambda s, b, h, q, k: s.astype(int) + (s > 0).astype("float32") + (q - k).astype(bool).astype(numpy.int64),
    "casts_of_numbers": lambda s, b, h, q, k: numpy.where(h > 3, 1, 0) * s + numpy.where(h > 3, 1, 0.5),
    "bools_count": lambda s, b, h, q, k: s * (q > k) + 2 * (h == 1) + (h != 1) * 1.5,
    "special": lambda s, b, h, q, k: numpy.where(numpy.isnan(s / (h - 3)) | numpy.isinf(s / (h - 3)), 0, s),
    "finite": lambda s, b, h, q, k: numpy.where(numpy.isfinite(1.0 / (h - 3)), numpy.zeros_like(s), numpy.ones_like(s)),
    "like": lambda s, b, h, q, k: numpy.full_like(s, 2.5) + numpy.full_like(h, 3),
    "bias": lambda s, b, h, q, k, bias: s + bias[h, q - k],
    "bias_of_a_head": lambda s, b, h, q, k, *, bias: s + bias[-1, q - k] + bias[0, numpy.clip(k, 0, 63)],
    "nested": lambda s, b, h, q, k, bias, groups: s * bias[groups[h], k],
    "any_keywords": lambda s, b, h, q, k, **inputs: s * inputs["scale"][()] + inputs["scale"],
    "flags": lambda s, b, h, q, k, flags: numpy.where(flags[b, k], s, -1e30),
}

MASK_MODS = {
    "all": lambda b, h, q, k: True,
    "none": lambda b, h, q, k: numpy.False_,
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q - k < 16) & (k <= q),
    "sinks_and_window": lambda b, h, q, k: (k < 4) | (q - k < 16),
    "dilated": lambda b, h, q, k: ~((q - k) % 4 != 0),
    "logical": lambda b, h, q, k: numpy.logical_and(q > k, numpy.logical_not(h)) | numpy.logical_xor(h == 1, k > 9),
    "by_heads": lambda b, h, q, k: ((h % 2 == 0) ^ (k > q // 2)) | numpy.logical_or(h < 2, b >= 1),
    "equal_bools": lambda b, h, q, k: (h < 3) == (k < 9),
    "ordered_bools": lambda b, h, q, k: (h < 3) <= (k < 9),
    "document": lambda b, h, q, k, flags: flags[b, q] == flags[b, k],
    "chosen": lambda b, h, q, k: numpy.where(h < 3, q - k < 9, True),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_a_score_mod_its_term_and_its_text_agree(name):
    result = agree(SCORE_MODS[name])
    assert result.result.dtype == "float32"
    assert not result.uses_torch
    assert result.constants == ()


@pytest.mark.parametrize("name", MASK_MODS)
def test_a_mask_mod_its_term_and_its_text_agree(name):
    assert agree(MASK_MODS[name], "mask_mod").result.dtype == "bool"


def whole_number(draw, depth):
    """A function of random operations with whole numbers, whose arguments are those of a mask_mod."""
    if depth == 0 or draw.random() < 0.1:
        place, number = draw.randrange(6), draw.randint(-9, 9)
        return (lambda *args: args[place]) if place < 4 else lambda *args: number
    one, other = whole_number(draw, depth - 1), whole_number(draw, depth - 1)
    if draw.random() < 0.2:
        compute = draw.choice([operator.neg, operator.invert, operator.abs])
        return lambda *args: compute(one(*args))
    if draw.random() < 0.2:
        compare = draw.choice([operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge])
        return lambda *args: numpy.where(compare(one(*args), other(*args)), one(*args), other(*args))
    if draw.random() < 0.2:
        compute, divisor = draw.choice([operator.floordiv, operator.mod]), draw.choice([-7, -2, 1, 2, 3, 8])
        return lambda *args: compute(one(*args), divisor)
    compute = draw.choice([*(operator.add, operator.sub, operator.mul, operator.and_, operator.or_, operator.xor)])
    compute = draw.choice([compute, numpy.minimum, numpy.maximum])
    return lambda *args: compute(one(*args), other(*args))


@pytest.mark.parametrize("seed", range(60))
def test_random_whole_numbers_agree_and_are_in_their_interval(seed):
    number = whole_number(random.Random(seed), 4)
    values, arrays = arguments()
    result = traced(lambda b, h, q, k: number(b, h, q, k) >= 0, "mask_mod")
    expected = number(*list(values.values())[1:])
    assert numpy.abs(expected).max() < 1 << 31  # of these seeds; int32 would wrap
    agree(lambda s, b, h, q, k: number(b, h, q, k))
    for term in parts(result.result):
        if term.dtype == "int32":
            low, high = interval(term, HEADS)
            found = term_value(term, values, arrays)
            assert low is None or low <= numpy.min(found)
            assert high is None or numpy.max(found) <= high
            assert not inside(term, 10, HEADS) or (numpy.min(found) >= 0 and numpy.max(found) < 10)
