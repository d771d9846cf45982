"""Terms: what a function computes twice is there once, and their texts and intervals."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import subprocess
import sys

import numpy
import pytest

from pa_compiler.ranges import inside, interval
from pa_compiler.score import Input, Term, names_read, parts
from pa_compiler.score_text import text
from pa_compiler.tracing import trace

HEADS = 8
INPUTS = (Input("bias", "float16", (HEADS, 64)), Input("scale", "float32", ()))


def traced(function, field="score_mod"):
    return trace(field, function, INPUTS, num_heads=HEADS)


TEXTS = {
    "window": (
        lambda s, b, h, q, k: numpy.where(q - k < 128, s, -numpy.inf),
        "where(query_pos - key_pos < 128, score, -inf)",
    ),
    "shared": (
        lambda s, b, h, q, k: numpy.where(q - k < 128, s, (q - k) * 0.1),
        "t0 = query_pos - key_pos; where(t0 < 128, score, float32(t0) * 0.1)",
    ),
    "numbers": (
        lambda s, b, h, q, k: s * 100 + 1e-5 - 1e16 + 16777216 * h,
        "score * 100.0 + 1e-05 - 1e+16 + float32(16777216 * head)",
    ),
    "signs": (
        lambda s, b, h, q, k: operator.neg(-(s - 1)) - -2.0 * (-2 * s),
        "-(-(score - 1.0)) - -2.0 * (-2.0 * score)",
    ),
    "sides": (
        lambda s, b, h, q, k: s - (s - 1) - 1 / (s / 2) * (s + 1),
        "score - (score - 1.0) - 1.0 / (score / 2.0) * (score + 1.0)",
    ),
    "comparisons": (
        lambda s, b, h, q, k: ((h < k) == (q < k)) * s,
        "float32((head < key_pos) == (query_pos < key_pos)) * score",
    ),
    "elements": (lambda s, b, h, q, k, bias, scale: s + bias[h, k] * scale, "score + bias[head, key_pos] * scale[()]"),
    "constant": (lambda s, b, h, q, k: 2, "2.0"),
}


def run(program, **environment):
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name):
    function, expected = TEXTS[name]
    assert traced(function).text == expected


def test_texts_are_those_of_other_processes():
    program = (
        "from pa_compiler.tracing import trace\n"
        "print(trace('mask_mod', lambda b, h, q, k: (q - k < 9) & ((k - q) * (q - k) < h), (), num_heads=4).text)"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert texts == {"t0 = query_pos - key_pos; (t0 < 9) & ((key_pos - query_pos) * t0 < head)\n"}


def test_what_is_computed_twice_is_there_once():
    def doubled(s, b, h, q, k):
        for _ in range(200):
            s = s + s
        return s

    function = traced(doubled)
    assert len(parts(function.result)) == 201
    assert function.text.count("; ") == 199
    assert function == traced(doubled)
    assert function.result is traced(doubled).result
    assert interval(function.result, HEADS) == (None, None)


def test_a_long_chain_is_no_recursion():
    def chain(s, b, h, q, k):
        for number in range(5000):
            s = s + number
        return s

    function = traced(chain)
    assert function.text.endswith(" + 4998.0 + 4999.0")
    assert names_read(function.result) == set()


def test_terms_are_one_object():
    one = Term("add", "int32", (Term("head", "int32"), Term("number", "int32", (), 1)))
    assert pickle.loads(pickle.dumps(one)) is one
    assert copy.deepcopy(one) is one
    assert Term("number", "float32", (), 0.0) is not Term("number", "float32", (), -0.0)
    assert Term("number", "float32", (), float("nan")) is Term("number", "float32", (), float("nan"))
    with pytest.raises(AttributeError, match="op stays"):
        one.op = "subtract"
    assert text(one) == "head + 1"


HEAD, KEY = Term("head", "int32"), Term("key_pos", "int32")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda b, h, q, k: h, (0, 7)),
        (lambda b, h, q, k: 7 - h // 2, (4, 7)),
        (lambda b, h, q, k: (h * 3 + 1) % 8, (0, 7)),
        (lambda b, h, q, k: (h - 2) * (h - 5), (-2, 10)),
        (lambda b, h, q, k: q - k, (1 - (1 << 30), (1 << 30) - 1)),
        (lambda b, h, q, k: numpy.clip(q - k, 0, 127), (0, 127)),
        (lambda b, h, q, k: (q - k) % 32, (0, 31)),
        (lambda b, h, q, k: k // 1024, (0, (1 << 20) - 1)),
        (lambda b, h, q, k: k & 63, (0, 63)),
        (lambda b, h, q, k: q * 4, (None, None)),
        (lambda b, h, q, k: abs(q - k), (0, (1 << 30) - 1)),
        (lambda b, h, q, k: numpy.where(k < 9, h, 12), (0, 12)),
        (lambda b, h, q, k: (k < q).astype(int) * 5, (0, 5)),
        (lambda b, h, q, k: k % h, (None, None)),
    ],
)
def test_intervals(function, expected):
    comparison = traced(lambda b, h, q, k: function(b, h, q, k) < 1, "mask_mod").result
    assert interval(comparison.args[0], HEADS) == expected


def test_inside():
    assert inside(HEAD, 8, HEADS)
    assert not inside(HEAD, 7, HEADS)
    assert not inside(KEY, 1 << 20, HEADS)
    assert inside(Term("batch", "int32"), "batch", HEADS)
    assert not inside(HEAD, "batch", HEADS)
