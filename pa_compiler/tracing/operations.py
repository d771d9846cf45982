"""Operations on terms and numbers, one for each of Term's.

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
    if not isinstance(value, bool | int | float):
        raise RefusedTypeError(f"{value!r} used as a number")
    if dtype == "bool":
        return Term("number", dtype, (), bool(value))
    if dtype == "int32":
        if not math.isfinite(value) or not -(1 << 31) <= int(value) < 1 << 31:
            raise RefusedValueError(f"expected numbers that int32 holds, got {value}")
        return Term("number", dtype, (), int(value))
    try:
        return Term("number", dtype, (), struct.unpack("<f", struct.pack("<f", value))[0])
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


def numeric(name: str, *operands: Operand) -> list[Term]:
    """The same, where they are no bools."""
    terms = common(*operands)
    if terms[0].dtype == "bool":
        raise RefusedTypeError(f"{name} of bool: &, | and ^ are for those, or a cast to a number")
    return terms


def _arithmetic(op: str) -> Callable[[Operand, Operand], Term]:
    """Of two numbers, int32 or float32."""

    def build(input: Operand, other: Operand) -> Term:
        terms = numeric(op, input, other)
        return Term(op, terms[0].dtype, tuple(terms))

    return build


def _of_one(op: str) -> Callable[[Operand], Term]:
    """Of one number, int32 or float32."""

    def build(input: Operand) -> Term:
        (term,) = numeric(op, input)
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


def positive(input: Operand) -> Term:
    return numeric("+", input)[0]


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


def floor(input: Operand) -> Term:
    (term,) = numeric("floor", input)
    return Term("floor", "float32", (term,)) if term.dtype == "float32" else term


def reflected(build: Callable[[Operand, Operand], Term]) -> Callable[[Operand, Operand], Term]:
    """With its operands in the other order, as Python's __rsub__ has them."""
    return lambda input, other: build(other, input)
