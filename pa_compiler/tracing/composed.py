"""Operations that are made of those of operations.py."""

from __future__ import annotations

import math
from collections.abc import Callable

from pa_compiler.score import Term
from pa_compiler.tracing.operations import (
    Operand,
    RefusedTypeError,
    absolute,
    add,
    cast,
    common,
    divide,
    equal,
    exp,
    floor,
    floor_divide,
    less,
    log,
    maximum,
    minimum,
    multiply,
    negative,
    not_equal,
    number,
    numeric,
    remainder,
    sqrt,
    subtract,
    type_of,
    where,
)

_LARGEST_POWER = 16
_LARGEST_SHIFT = 30


def masked_fill(input: Operand, mask: Operand, value: Operand) -> Term:
    return where(mask, value, input)


def clamp(input: Operand, min: Operand | None = None, max: Operand | None = None) -> Term:
    if min is None and max is None:
        raise RefusedTypeError("clamp without a least and a greatest number")
    least = common(input)[0] if min is None else maximum(input, min)
    return least if max is None else minimum(least, max)


def ceil(input: Operand) -> Term:
    (term,) = numeric("ceil", input)
    return negative(floor(negative(term))) if term.dtype == "float32" else term


def trunc(input: Operand) -> Term:
    (term,) = numeric("trunc", input)
    return where(less(term, 0), ceil(term), floor(term)) if term.dtype == "float32" else term


def nearest(input: Operand) -> Term:
    """The nearest whole number, and of two the even one. What float32 holds from 2**23 on is whole."""
    (term,) = numeric("rounding", input)
    if term.dtype != "float32":
        return term
    below = floor(term)
    beyond = subtract(term, below)
    halfway = where(less(0.5, beyond), add(below, 1), add(below, remainder(below, 2)))
    return where(less(absolute(term), 1 << 23), where(less(beyond, 0.5), below, halfway), term)


def sign(input: Operand) -> Term:
    (term,) = numeric("sign", input)
    return where(less(term, 0), -1, where(less(0, term), 1, term))


def square(input: Operand) -> Term:
    return multiply(input, input)


def reciprocal(input: Operand) -> Term:
    if type_of(input) != "float32":
        raise RefusedTypeError("reciprocal of a whole number, of which NumPy and torch make different things")
    return divide(1, input)


def rsqrt(input: Operand) -> Term:
    return divide(1, sqrt(input))


def relu(input: Operand, inplace: bool = False) -> Term:
    return maximum(input, 0)


def log2(input: Operand) -> Term:
    return multiply(log(input), 1 / math.log(2))


def log10(input: Operand) -> Term:
    return multiply(log(input), 1 / math.log(10))


def exp2(input: Operand) -> Term:
    """exp(input * ln 2), with the rounding of that product: a relative error of up to 2**-23 * |input| beside exp's."""
    return exp(multiply(cast(input, "float32"), math.log(2)))


def isnan(input: Operand) -> Term:
    term = cast(input, "float32")
    return not_equal(term, term)


def isinf(input: Operand) -> Term:
    return equal(absolute(cast(input, "float32")), math.inf)


def isfinite(input: Operand) -> Term:
    return less(absolute(cast(input, "float32")), math.inf)


def power(input: Operand, exponent: Operand) -> Term:
    """By multiplications for small whole exponents, by sqrt for halves, by exp for bases that are numbers above 0."""
    if isinstance(exponent, Term):
        if isinstance(input, Term) or not 0 < input < math.inf:
            raise RefusedTypeError("a power whose exponent is a value: its base can only be a number above 0")
        if not isinstance(input, float) and exponent.dtype != "float32":
            raise RefusedTypeError(f"a power of whole numbers whose exponent is a value: {input}.0 is a base for it")
        return exp2(exponent) if input == 2 else exp(multiply(cast(exponent, "float32"), math.log(input)))
    if abs(exponent) == 0.5:
        return (sqrt if exponent > 0 else rsqrt)(input)
    if not float(exponent).is_integer() or abs(exponent) > _LARGEST_POWER:
        raise RefusedTypeError(f"a power of {exponent}: only whole ones up to {_LARGEST_POWER}, 0.5 and -0.5")
    (term,) = numeric("power", input)
    term = cast(term, "float32") if isinstance(exponent, float) else term
    if exponent < 0:
        if term.dtype == "int32":
            raise RefusedTypeError(f"a power of {exponent} of a whole number")
        return divide(1, power(term, -exponent))
    result = None
    for bit in reversed(range(int(exponent).bit_length())):
        result = term if result is None else square(result)
        if bit != int(exponent).bit_length() - 1 and int(exponent) >> bit & 1:
            result = multiply(result, term)
    return number(1, term.dtype) if result is None else result


def _shift(name: str, build: Callable[[Operand, Operand], Term]) -> Callable[[Operand, Operand], Term]:
    def shifted(input: Operand, other: Operand) -> Term:
        if isinstance(other, Term) or not isinstance(other, int) or not 0 <= other <= _LARGEST_SHIFT:
            raise RefusedTypeError(f"{name} by anything but a number from 0 to {_LARGEST_SHIFT}")
        if type_of(input) != "int32":
            raise RefusedTypeError(f"{name} of {type_of(input)}")
        return build(input, 1 << other)

    return shifted


left_shift, right_shift = _shift("<<", multiply), _shift(">>", floor_divide)


def full_like(input: Operand, fill_value: Operand) -> Term:
    return cast(fill_value, type_of(input))


def zeros_like(input: Operand) -> Term:
    return cast(0, type_of(input))


def ones_like(input: Operand) -> Term:
    return cast(1, type_of(input))
