"""Operations on terms and numbers, by the names that NumPy and torch have for them, as the few of Term.

An operand is a Term or a number of Python. Types are int32, float32 and bool. Operands are brought to the largest of
their types, bool below int32 below float32; a number of Python has the type that it has there. Parameters have torch's
names.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from pa_compiler.score import Term

Operand = Term | bool | int | float

_TYPES = ("bool", "int32", "float32")
_LARGEST_POWER = 16
_LARGEST_SHIFT = 30


class RefusedTypeError(TypeError):
    """What a function does with a value cannot be lowered. The message says what, and not where."""


class RefusedValueError(ValueError):
    """A number that a function names cannot be what it is used for. The message says what, and not where."""


def type_of(operand: Operand) -> str:
    if isinstance(operand, Term):
        return operand.dtype
    return "bool" if isinstance(operand, bool) else "int32" if isinstance(operand, int) else "float32"


def number(value: bool | int | float, dtype: str) -> Term:
    """A number of Python as dtype: rounded to float32, towards zero to int32."""
    if dtype == "bool":
        return Term("number", dtype, (), bool(value))
    if dtype == "int32":
        if not math.isfinite(value) or not -(1 << 31) <= int(value) < 1 << 31:
            raise RefusedValueError(f"expected numbers that int32 holds, got {value}")
        return Term("number", dtype, (), int(value))
    try:
        return Term("number", dtype, (), struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        raise RefusedValueError(f"expected numbers that float32 holds, got {value}") from None


def cast(operand: Operand, dtype: str) -> Term:
    if not isinstance(operand, Term):
        return number(operand, dtype)
    return operand if operand.dtype == dtype else Term("cast", dtype, (operand,))


def common(*operands: Operand) -> list[Term]:
    """Operands as terms of the largest of their types."""
    dtype = max(map(type_of, operands), key=_TYPES.index)
    return [cast(operand, dtype) for operand in operands]


def _numbers(name: str, *operands: Operand) -> list[Term]:
    terms = common(*operands)
    if terms[0].dtype == "bool":
        raise RefusedTypeError(f"{name} of bool: &, | and ^ are for those, or a cast to a number")
    return terms


def _arithmetic(op: str) -> Callable[[Operand, Operand], Term]:
    """Of two numbers, int32 or float32."""

    def build(input: Operand, other: Operand) -> Term:
        terms = _numbers(op, input, other)
        return Term(op, terms[0].dtype, tuple(terms))

    return build


def _of_one(op: str) -> Callable[[Operand], Term]:
    """Of one number, int32 or float32."""

    def build(input: Operand) -> Term:
        (term,) = _numbers(op, input)
        return Term(op, term.dtype, (term,))

    return build


def _of_float(op: str) -> Callable[[Operand], Term]:
    def build(input: Operand) -> Term:
        return Term(op, "float32", (cast(input, "float32"),))

    return build


def _of_bits(op: str) -> Callable[[Operand, Operand], Term]:
    def build(input: Operand, other: Operand) -> Term:
        terms = common(input, other)
        if terms[0].dtype == "float32":
            raise RefusedTypeError(f"bits of float32 ({op}): a comparison makes a bool, a cast makes an int32")
        return Term(op, terms[0].dtype, tuple(terms))

    return build


def _logical(op: str) -> Callable[[Operand, Operand], Term]:
    def build(input: Operand, other: Operand) -> Term:
        return Term(op, "bool", (cast(input, "bool"), cast(other, "bool")))

    return build


add, subtract, multiply = map(_arithmetic, ("add", "subtract", "multiply"))
floor_divide, remainder, minimum, maximum = map(_arithmetic, ("floor_divide", "remainder", "minimum", "maximum"))
negative, absolute = map(_of_one, ("negative", "absolute"))
exp, log, sqrt, tanh, sigmoid = map(_of_float, ("exp", "log", "sqrt", "tanh", "sigmoid"))
bits_and, bits_or, bits_xor = map(_of_bits, ("and", "or", "xor"))
logical_and, logical_or, logical_xor = map(_logical, ("and", "or", "xor"))


def divide(input: Operand, other: Operand, rounding_mode: str | None = None) -> Term:
    if rounding_mode == "floor":
        return floor_divide(input, other)
    if rounding_mode is not None:
        raise RefusedTypeError(f"division with rounding_mode {rounding_mode!r}")
    return Term("divide", "float32", (cast(input, "float32"), cast(other, "float32")))


def invert(input: Operand) -> Term:
    (term,) = common(input)
    if term.dtype == "float32":
        raise RefusedTypeError("~ of float32: a comparison makes a bool")
    return Term("not", term.dtype, (term,))


def logical_not(input: Operand) -> Term:
    return Term("not", "bool", (cast(input, "bool"),))


def less(input: Operand, other: Operand) -> Term:
    terms = common(input, other)
    terms = [cast(term, "int32") for term in terms] if terms[0].dtype == "bool" else terms
    return Term("less", "bool", tuple(terms))


def less_equal(input: Operand, other: Operand) -> Term:
    return Term("less_equal", "bool", less(input, other).args)


def greater(input: Operand, other: Operand) -> Term:
    return less(other, input)


def greater_equal(input: Operand, other: Operand) -> Term:
    return less_equal(other, input)


def equal(input: Operand, other: Operand) -> Term:
    return Term("equal", "bool", tuple(common(input, other)))


def not_equal(input: Operand, other: Operand) -> Term:
    return logical_not(equal(input, other))


def where(condition: Operand, input: Operand, other: Operand) -> Term:
    terms = common(input, other)
    return Term("where", terms[0].dtype, (cast(condition, "bool"), *terms))


def masked_fill(input: Operand, mask: Operand, value: Operand) -> Term:
    return where(mask, value, input)


def clamp(input: Operand, min: Operand | None = None, max: Operand | None = None) -> Term:
    if min is None and max is None:
        raise RefusedTypeError("clamp without a least and a greatest number")
    least = input if min is None else maximum(input, min)
    return cast(least, type_of(least)) if max is None else minimum(least, max)


def floor(input: Operand) -> Term:
    (term,) = _numbers("floor", input)
    return Term("floor", "float32", (term,)) if term.dtype == "float32" else term


def ceil(input: Operand) -> Term:
    (term,) = _numbers("ceil", input)
    return negative(floor(negative(term))) if term.dtype == "float32" else term


def trunc(input: Operand) -> Term:
    (term,) = _numbers("trunc", input)
    return where(less(term, 0), ceil(term), floor(term)) if term.dtype == "float32" else term


def round_to_even(input: Operand) -> Term:
    """The nearest whole number, and of two the even one. What float32 holds from 2**23 on is whole."""
    (term,) = _numbers("round", input)
    if term.dtype != "float32":
        return term
    below = floor(term)
    beyond = subtract(term, below)
    halfway = where(less(0.5, beyond), add(below, 1), add(below, remainder(below, 2)))
    return where(less(absolute(term), 1 << 23), where(less(beyond, 0.5), below, halfway), term)


def sign(input: Operand) -> Term:
    (term,) = _numbers("sign", input)
    return where(less(term, 0), -1, where(less(0, term), 1, term))


def square(input: Operand) -> Term:
    return multiply(input, input)


def reciprocal(input: Operand) -> Term:
    if type_of(input) != "float32":
        raise RefusedTypeError("reciprocal of a whole number, of which NumPy and torch make different things")
    return divide(1, input)


def rsqrt(input: Operand) -> Term:
    return divide(1, sqrt(input))


def relu(input: Operand) -> Term:
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
        if isinstance(input, Term) or not isinstance(input, float) or not 0 < input < math.inf:
            raise RefusedTypeError("a power whose exponent is a value: its base can only be a number above 0, as 2.0")
        return exp2(exponent) if input == 2 else exp(multiply(cast(exponent, "float32"), math.log(input)))
    if abs(exponent) == 0.5:
        return (sqrt if exponent > 0 else rsqrt)(input)
    if not float(exponent).is_integer() or abs(exponent) > _LARGEST_POWER:
        raise RefusedTypeError(f"a power of {exponent}: only whole ones up to {_LARGEST_POWER}, 0.5 and -0.5")
    (term,) = _numbers("power", input)
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


def filled_like(input: Operand, fill_value: Operand) -> Term:
    return cast(fill_value, type_of(input))


def zeros_like(input: Operand) -> Term:
    return cast(0, type_of(input))


def ones_like(input: Operand) -> Term:
    return cast(1, type_of(input))


def reflected(build: Callable[[Operand, Operand], Term]) -> Callable[[Operand, Operand], Term]:
    """With its operands in the other order, as Python's __rsub__ has them."""
    return lambda input, other: build(other, input)
