"""Functions of real numbers, in operations that every vector unit has. exp is in a file of its own."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Let, Var

_TANH_END = 9.0
"""From here on float32 has no number between tanh and 1 that is nearer."""

_TANH_P = (1.0, 0.133810505, 0.00349561684, 2.06096195e-05, 1.33551967e-08)
_TANH_Q = (1.0, 0.467143655, 0.0258770939, 0.000328568014, 7.77679247e-07)


def tanh(x: Expr) -> Expr:
    """tanh(x) for float32, with a relative error below 5e-7; NaN for NaN.

    x * P(x**2) / Q(x**2) for |x| up to 9, where P and Q have the least relative error for their degrees, 2e-8.
    """
    end = T.float32(_TANH_END)
    clamped, square = Var("tanh_x", "float32"), Var("tanh_square", "float32")
    ratio = clamped * _polynomial(square, _TANH_P) / _polynomial(square, _TANH_Q)
    bounded = T.Select(x > end, end, T.Select(x < -end, -end, x))
    return Let(clamped, bounded, Let(square, clamped * clamped, ratio))


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """The polynomial with these coefficients, from the constant on, by Horner's rule."""
    value: Expr = T.float32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + T.float32(coefficient)
    return value
