"""Functions of scores and masks that cannot be compiled: what is said of each, and where it stands."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy
import pytest

from pa_compiler.score import Input
from pa_compiler.tracing import trace

HEADS = 8
INPUTS = (
    Input("bias", "float32", (HEADS, 64)),
    Input("lengths", "int32", ("batch",)),
    Input("allowed", "bool", (HEADS,)),
    Input("scale", "float32", ()),
)
ARRAY = numpy.arange(8.0)
WHOLE = numpy.arange(8)
NUMBERS = [1, 2, 3]
KEPT = []


def traced(function, field="score_mod"):
    return trace(field, function, INPUTS, num_heads=HEADS)


TRUTH = "a value asked whether it is true, by if, and, or, not, in, min(), max() or a chain as 0 <= x < 5"

OPERATIONS = {
    "if": (lambda s, b, h, q, k: s if q >= k else 0, TRUTH),
    "and": (lambda s, b, h, q, k: s * ((q >= k) and (h > 1)), TRUTH),
    "not": (lambda s, b, h, q, k: not s, TRUTH),
    "chain": (lambda s, b, h, q, k: s * (0 <= q - k < 5), "where(), &, | and ~ do that, as (0 <= x) & (x < 5)"),
    "min": (lambda s, b, h, q, k: min(s, 1), TRUTH),
    "in": (lambda s, b, h, q, k: s * (h in NUMBERS), TRUTH),
    "float": (lambda s, b, h, q, k: math.exp(s), "a value made into a float of Python: it is known at run time alone"),
    "int": (lambda s, b, h, q, k: int(s), "a value made into a int of Python"),
    "index": (lambda s, b, h, q, k: NUMBERS[h], "a value where Python needs a whole number, as an index or in range()"),
    "range": (lambda s, b, h, q, k: sum(range(h)), "arrays of NumPy are given as `inputs`"),
    "len": (lambda s, b, h, q, k: len(s), "len() of a value, which is one number"),
    "iter": (lambda s, b, h, q, k: sum(s), "a value taken apart or gone through"),
    "dict": (lambda s, b, h, q, k: {0: 1}[h], "a value as the key of a dict or in a set"),
    "round": (lambda s, b, h, q, k: round(s), "round() of a value: numpy.rint or torch.round"),
    "write": (lambda s, b, h, q, k: s.__setitem__(0, 1), "a value written to"),
    "index_of_value": (lambda s, b, h, q, k: s[h], "an index into a value, which is one number"),
    "shape": (lambda s, b, h, q, k: s.shape, ".shape of a value, which is not known when a function is compiled"),
    "size": (lambda s, b, h, q, k: s.size(0), ".size of a value"),
    "numel": (lambda s, b, h, q, k: s.numel(), ".numel of a value"),
    "item": (lambda s, b, h, q, k: s.item(), ".item of a value"),
    "in_place": (lambda s, b, h, q, k: s.mul_(2), ".mul_ of a value"),
    "dtype": (lambda s, b, h, q, k: s if s.dtype == numpy.float32 else 0, "a .dtype compared"),
    "ufunc": (lambda s, b, h, q, k: numpy.sin(s), "numpy.sin, which is not one of the functions that can be compiled"),
    "expm1": (lambda s, b, h, q, k: numpy.expm1(s), "numpy.expm1, which is not one of"),
    "function": (lambda s, b, h, q, k: numpy.sum(s), "numpy.sum, which is not one of"),
    "reduction": (lambda s, b, h, q, k: numpy.add.reduce(s), "numpy.add.reduce"),
    "out": (lambda s, b, h, q, k: numpy.add(s, 1, out=ARRAY), "numpy.add called so that it cannot be compiled"),
    "decimals": (lambda s, b, h, q, k: numpy.round(s, 2), "numpy.round called so that it cannot be compiled"),
    "one_where": (lambda s, b, h, q, k: numpy.where(s > 0), "numpy.where called so that it cannot be compiled"),
    "array_indexed": (lambda s, b, h, q, k: s + ARRAY[h], "arrays of NumPy are given as `inputs`"),
    "whole_array_indexed": (lambda s, b, h, q, k: s + WHOLE[q - k], "arrays of NumPy are given as `inputs`"),
    "array_on_the_left": (lambda s, b, h, q, k: ARRAY * s, "an array of shape (8,) used whole"),
    "array_on_the_right": (lambda s, b, h, q, k: s * ARRAY, "arrays of NumPy are given as `inputs`"),
    "made_an_array": (lambda s, b, h, q, k: numpy.asarray(s), "a value made into an array"),
    "string": (lambda s, b, h, q, k: s + "1", "'1' used as a number"),
    "none": (lambda s, b, h, q, k: s + None, "None used as a number"),
    "complex": (lambda s, b, h, q, k: s * 1j, "1j of type complex, which is no number"),
    "bools_added": (lambda s, b, h, q, k: (q > k) + (h > 1), "add of bool: &, | and ^ are for those"),
    "bits_of_score": (lambda s, b, h, q, k: s & 1, "bits of float32 (and)"),
    "not_score": (lambda s, b, h, q, k: ~s, "~ of float32"),
    "half": (lambda s, b, h, q, k: s.astype(numpy.float16), "a cast to float16: only to float32, int32 and bool"),
    "unsigned": (lambda s, b, h, q, k: k.astype("uint32"), "a cast to uint32"),
    "power": (lambda s, b, h, q, k: s**2.5, "a power of 2.5: only whole ones up to 16, 0.5 and -0.5"),
    "infinite_power": (lambda s, b, h, q, k: s**math.inf, "a power of inf"),
    "power_of_value": (lambda s, b, h, q, k: abs(s) ** h, "its base can only be a number above 0"),
    "whole_power": (lambda s, b, h, q, k: 2**h, "a power of whole numbers whose exponent is a value: 2.0 is a base"),
    "negative_power": (lambda s, b, h, q, k: h**-1, "a power of -1 of a whole number"),
    "shift": (lambda s, b, h, q, k: 1 << h, "<< by anything but a number from 0 to 30"),
    "whole_input": (lambda s, b, h, q, k, bias: s + bias, "input bias used whole: index it with brackets"),
    "part_of_input": (lambda s, b, h, q, k, bias: s + bias[h], "an index into input bias with 1 of 2 indices"),
    "slice": (lambda s, b, h, q, k, bias: s + bias[h, :], "an index into input bias with a slice, None or ..."),
    "ellipsis": (lambda s, b, h, q, k, bias: s + bias[..., k], "with a slice, None or ..."),
    "new_axis": (lambda s, b, h, q, k, bias: s + bias[h, k, None], "with a slice, None or ..."),
    "mask_as_index": (lambda s, b, h, q, k, bias: s + bias[h, k > 1], "an index into input bias, axis 1, with a bool"),
    "float_as_index": (
        lambda s, b, h, q, k, bias: s + bias[h, k / 2],
        "an index into input bias, axis 1, with a float32",
    ),
    "shape_of_batch": (lambda s, b, h, q, k, lengths: s * lengths.shape[0], "the shape of input lengths"),
    "len_of_scale": (lambda s, b, h, q, k, scale: len(scale), "len() of input scale, which is one number"),
    "if_input": (lambda s, b, h, q, k, allowed: s if allowed[h] else 0, TRUTH),
    "kept": (lambda s, b, h, q, k: (KEPT.append(s), KEPT[0] * 2 + s)[1], "a value of another call of a function"),
}

NUMBERS_OUTSIDE = {
    "large_int": (lambda s, b, h, q, k: q + 2**31, "expected numbers that int32 holds, got 2147483648"),
    "large_float": (lambda s, b, h, q, k: s * 1e39, "expected numbers that float32 holds, got 1e+39"),
    "infinite_int": (lambda s, b, h, q, k: numpy.full_like(h, math.inf), "expected numbers that int32 holds, got inf"),
    "head": (
        lambda s, b, h, q, k, bias: s + bias[h + 1, 0],
        "an index into input bias, axis 0: expected 0 to 7, got 8 from head + 1",
    ),
    "head_between": (
        lambda s, b, h, q, k, allowed: s * allowed[(h - 3) * (h - 3)],
        "an index into input allowed, axis 0: expected 0 to 7, got 9 from t0 = head - 3; t0 * t0",
    ),
    "number": (lambda s, b, h, q, k, bias: s + bias[0, 64], "axis 1: expected 0 to 63, got 64 from 64"),
    "negative": (lambda s, b, h, q, k, bias: s + bias[-9, 0], "axis 0: expected an index inside of 8, got -9"),
    "negative_sequence": (lambda s, b, h, q, k, lengths: lengths[-1], "expected an index inside of batch, got -1"),
    "position": (
        lambda s, b, h, q, k, bias: s + bias[h, k + 64],
        "axis 1: expected 0 to 63, got 64 from key_pos + 64",
    ),
    "before": (lambda s, b, h, q, k, bias: s + bias[h, -1 - k], "axis 1: expected 0 to 63, got -1 from -1 - key_pos"),
}


def message(kind, function, field="score_mod"):
    with pytest.raises(kind) as caught:
        traced(function, field)
    assert caught.type is kind  # not one of the room's own
    return str(caught.value)


def with_its_line(said, function):
    """What is said after the function's name and line, which are checked."""
    line = function.__code__.co_firstlineno
    begin = f"score_mod: <lambda>, at {__file__}:"
    assert said.startswith(begin)
    assert line <= int(re.match(r"\d+", said.removeprefix(begin)).group()) <= line + 1
    return said


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_refused_with_its_line(name):
    function, expected = OPERATIONS[name]
    KEPT.clear()
    assert expected in with_its_line(message(TypeError, function), function)


@pytest.mark.parametrize("name", NUMBERS_OUTSIDE)
def test_a_number_is_refused_with_its_line(name):
    function, expected = NUMBERS_OUTSIDE[name]
    assert with_its_line(message(ValueError, function), function).endswith(expected)


def test_indices_that_may_be_inside_are_taken():
    assert traced(lambda s, b, h, q, k, bias: bias[h, q - k]).text == "bias[head, query_pos - key_pos]"
    assert traced(lambda s, b, h, q, k, bias: bias[7 - h, -1]).text == "bias[7 - head, 63]"
    assert traced(lambda s, b, h, q, k, lengths: lengths[b]).text == "float32(lengths[batch])"
    assert traced(lambda s, b, h, q, k, bias: bias[h, k % bias.shape[1]]).text == "bias[head, key_pos % 64]"


def named(score, batch, head, query_pos, key_pos):
    shifted = score + 1
    return helper(
        shifted,
    )


def helper(value):
    return value / 2 if value else 0


def test_the_line_is_the_innermost_of_the_users():
    line = helper.__code__.co_firstlineno + 1
    said = message(TypeError, named)
    assert said.startswith(f"score_mod: named, at {__file__}:{line} (return value / 2 if value else 0): {TRUTH}")


def test_the_line_of_a_partial_and_of_an_object():
    class Capped:
        def __call__(self, score, batch, head, query_pos, key_pos):
            return numpy.cosh(score)

    assert message(TypeError, Capped()).startswith(f"score_mod: Capped, at {__file__}:")
    assert message(TypeError, functools.partial(named)).startswith(f"score_mod: named, at {__file__}:")


RAISING = {
    "division": (lambda *args: 1 / 0, ValueError, "<lambda> raised ZeroDivisionError: division by zero, at"),
    "key": (lambda *args: {}["slope"], ValueError, "<lambda> raised KeyError: 'slope', at"),
    "type": (lambda *args: len(3), TypeError, "<lambda> raised TypeError: object of type 'int' has no len(), at"),
    "name": (lambda *args: no_such_name, TypeError, "<lambda> raised NameError: name 'no_such_name' is not"),  # noqa: F821
}


@pytest.mark.parametrize("name", RAISING)
def test_what_a_function_raises_is_told(name):
    function, kind, expected = RAISING[name]
    with pytest.raises(kind) as caught:
        traced(function, "mask_mod")
    assert str(caught.value).startswith(f"mask_mod: {expected}")
    assert f"{Path(__file__).name}:{function.__code__.co_firstlineno}" in str(caught.value)
    assert str(caught.value.__cause__) in str(caught.value)


RESULTS = {
    "tuple": ("score_mod", lambda s, *args: (s, s), "a number from <lambda>, got (<score>, <score>) of type tuple"),
    "none": ("score_mod", lambda s, *args: None, "a number from <lambda>, got None of type NoneType"),
    "bool": ("score_mod", lambda s, *args: True, "a number from <lambda>, got True"),
    "comparison": ("score_mod", lambda s, *args: s > 0, "a number from <lambda>, got a value of bool"),
    "array": ("score_mod", lambda s, *args: ARRAY, "a number from <lambda>, got an array of shape (8,)"),
    "whole_mask": ("mask_mod", lambda b, h, q, k: q - k, "a bool from <lambda>, got a value of int32"),
    "float_mask": ("mask_mod", lambda b, h, q, k: (q - k) * 0.5, "a bool from <lambda>, got a value of float32"),
    "number_mask": ("mask_mod", lambda b, h, q, k: 1, "a bool from <lambda>, got 1"),
    "whole_input": ("score_mod", lambda s, b, h, q, k, bias: bias, "a number from <lambda>, got input bias used whole"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_of_another_type_is_refused(name):
    field, function, expected = RESULTS[name]
    assert message(TypeError, function, field).startswith(f"{field}: expected {expected}")


SIGNATURES = {
    "three": ("score_mod", lambda s, b, h: s, "too many positional arguments"),
    "five_for_a_mask": ("mask_mod", lambda s, b, h, q, k: q > k, "missing a required argument: 'k'"),
    "no_such_input": ("score_mod", lambda s, b, h, q, k, table: s, "missing a required argument: 'table'"),
    "no_such_keyword": ("score_mod", lambda s, b, h, q, k, *, table: s, "missing a required"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_of_other_arguments_is_refused(name):
    field, function, expected = SIGNATURES[name]
    said = message(TypeError, function, field)
    score = "score, " if field == "score_mod" else ""
    begin = (
        f"{field}: expected a function that can be called with ({score}batch, head, query_pos, key_pos), got <lambda>("
    )
    assert said.startswith(begin)
    assert expected in said


def test_what_is_no_function_is_refused():
    assert message(TypeError, "causal") == "score_mod: expected a function, got 'causal' of type str"
    assert message(TypeError, None, "mask_mod") == "mask_mod: expected a function, got None of type NoneType"


def test_a_function_of_a_changing_value_is_refused():
    calls = []

    def counting(score, batch, head, query_pos, key_pos):
        calls.append(None)
        return score * len(calls)

    assert message(ValueError, counting) == (
        "score_mod: expected a function that always computes the same, but two calls of counting gave different "
        "expressions: score * 1.0 and score * 2.0"
    )


def test_a_value_that_left_its_function_is_known():
    left = []
    traced(lambda s, b, h, q, k: (left.append(s), s)[1])
    assert "a value of another call" in message(TypeError, lambda s, b, h, q, k: s + left[0])
