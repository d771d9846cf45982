"""Functions of real numbers, in operations that every vector unit has.

TVM's own become one call of libm for each lane. Each here is an expression of float32, right for every number, with the
subnormal ones, for the infinities and for NaN, of which it makes NaN. exp for the softmax is in a file of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Let, Var

from pa_compiler.kernels.exp import EXP_P, LN2_HIGH, LN2_LOW, LOG2_E

_TANH_END = 9.0
"""From here on float32 has no number between tanh and 1 that is nearer."""

_TANH_P = (1.0, 0.133810177, 0.00349557796, 2.06088844e-05, 1.33543381e-08)
_TANH_Q = (1.0, 0.467143327, 0.0258769467, 0.000328561699, 7.77643606e-07)

_EXP_ENDS = (-104.0, 89.0)
"""Beyond them exp is 0, or infinite."""

_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the significand
_ROUND_BITS = 0x4B400000

_LOG_P = (
    3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1, -1.2420140846e-1,
    1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2,
)  # fmt: skip
_SQRT_HALF_BITS = 0x3F3504F3
_SMALLEST_NORMAL = 2.0**-126

_WHOLE = 2.0**23
"""From here on all numbers of float32 are integers."""


def tanh(x: Expr, divide: Callable[[Expr, Expr], Expr] = operator.truediv) -> Expr:
    """tanh(x) for float32, with a relative error below 5e-7; NaN for NaN.

    x * P(x**2) / Q(x**2) for |x| up to 9, where P and Q have the least relative error for their degrees, 2e-8; the rest
    is rounding. Q is from 1 to 500: a target may know a division for such numbers.
    """
    end = T.float32(_TANH_END)
    clamped, square = Var("tanh_x", "float32"), Var("tanh_square", "float32")
    ratio = divide(clamped * _polynomial(square, _TANH_P), _polynomial(square, _TANH_Q))
    bounded = T.Select(x > end, end, T.Select(x < -end, -end, x))
    return Let(clamped, bounded, Let(square, clamped * clamped, ratio))


def exp(x: Expr) -> Expr:
    """exp(x), with a relative error below 2e-7, of subnormal results below half of their last place more.

    As store_exp, but that 2**n is two factors: the one infinite or subnormal result of them is rounded once.
    """
    low, high = map(T.float32, _EXP_ENDS)

    def of_bounded(x: Expr) -> Expr:
        return _let("exp_n", T.reinterpret("int32", x * T.float32(LOG2_E) + T.float32(_ROUND)), lambda n: scaled(x, n))

    def scaled(x: Expr, bits: Expr) -> Expr:
        n = T.reinterpret("float32", bits) - T.float32(_ROUND)
        fraction = x - n * T.float32(LN2_HIGH) - n * T.float32(LN2_LOW)
        return _let(
            "exp_f",
            fraction,
            lambda f: _let("exp_places", bits - _ROUND_BITS, lambda places: of_fraction(f, places)),
        )

    def of_fraction(f: Expr, places: Expr) -> Expr:
        half = T.shift_right(places, 1)
        series = _polynomial(f, EXP_P) * (f * f) + f + T.float32(1)
        return series * _power_of_two(half) * _power_of_two(places - half)

    return _let("exp_x", T.Select(x > high, high, T.Select(x < low, low, x)), of_bounded)


def log(x: Expr) -> Expr:
    """The natural logarithm of x, with a relative error below 2e-7: -inf of 0, NaN of what is below.

    x = 2**e * (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and f - f**2 / 2 + f**3 p(f) for the logarithm of 1 + f, where
    p is of degree 8 (Cephes, single/logf.c: S. L. Moshier, 1989).
    """

    def of_normal(y: Expr, subnormal: Expr) -> Expr:
        bits = T.reinterpret("int32", y) - _SQRT_HALF_BITS  # no variable: TVM would bound it, in two ways in an index
        exponent = T.Cast("float32", T.shift_right(bits, 23)) - T.Select(subnormal, T.float32(23), T.float32(0))
        significand = T.reinterpret("float32", T.bitwise_and(bits, 0x7FFFFF) + _SQRT_HALF_BITS)
        return _let("log_e", exponent, lambda e: _let("log_f", significand - T.float32(1), lambda f: of_fraction(e, f)))

    def of_fraction(e: Expr, f: Expr) -> Expr:
        rest = _polynomial(f, _LOG_P) * f * (f * f) + e * T.float32(LN2_LOW) - T.float32(0.5) * (f * f)
        return rest + f + e * T.float32(LN2_HIGH)

    def of(x: Expr) -> Expr:
        subnormal = x < T.float32(_SMALLEST_NORMAL)
        normal = T.Select(subnormal, x * T.float32(_WHOLE), x)
        finite = _let("log_y", normal, lambda y: of_normal(y, subnormal))
        end = T.Select(x == T.float32(0), T.float32("-inf"), T.float32("nan"))
        # of +inf and of NaN themselves
        return T.Select(x <= T.float32(0), end, T.Select(x < T.float32("inf"), finite, x))

    return _let("log_x", x, of)


def sqrt(x: Expr) -> Expr:
    """The square root of x, rounded as it should be: an instruction of every vector unit. NaN of what is below 0."""
    return T.sqrt(x)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x)), with a relative error below 4e-7, also where it is small."""

    def of(x: Expr) -> Expr:
        negative = x < T.float32(0)
        small = exp(T.Select(negative, x, -x))
        return _let("sigmoid_e", small, lambda e: T.Select(negative, e, T.float32(1)) / (e + T.float32(1)))

    return _let("sigmoid_x", x, of)


def floor(x: Expr) -> Expr:
    """The largest integer that is not above x. Exact; -0 is 0."""

    def of(x: Expr) -> Expr:
        # a conversion is undefined where int32 ends; what it gives there is not taken
        whole = T.Cast("float32", T.Cast("int32", x))
        below = _let("floor_whole", whole, lambda whole: whole - T.Select(whole > x, T.float32(1), T.float32(0)))
        small = T.And(x < T.float32(_WHOLE), x > T.float32(-_WHOLE))
        return T.Select(small, below, x)

    return _let("floor_x", x, of)


def _power_of_two(places: Expr) -> Expr:
    """2**places for places from -126 to 127."""
    return T.reinterpret("float32", T.shift_left(places + 127, 23))


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """The polynomial with these coefficients, from the constant on, by Horner's rule."""
    value: Expr = T.float32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + T.float32(coefficient)
    return value


def _let(name: str, value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """body of a value that is computed once."""
    variable = Var(name, value.ty.dtype)
    return Let(variable, value, body(variable))
