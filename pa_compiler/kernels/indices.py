"""Indices of the arrays that functions of scores read: nothing outside of an array is read, whatever they say."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from pa_compiler.ranges import inside
from pa_compiler.score import BATCH, Term, parts

_ZERO, _ONE = Term("number", "int32", (), 0), Term("number", "int32", (), 1)
_BATCH_SIZE = Term("batch_size", "int32")
_NAN = Term("number", "float32", (), math.nan)


def held_inside(term: Term, shapes: Mapping[str, tuple[int | str, ...]], num_heads: int) -> tuple[Term, Term | None]:
    """The same term with every index held inside its array, and whether one was outside.

    Args:
        term: What a function computes.
        shapes: Of the arrays, by name.
        num_heads: Query heads.

    Returns:
        The term; and a bool term, None where no index can be outside.
    """
    known: dict[Term, Term] = {}
    outside = []
    for each in parts(term):
        args = tuple(known[arg] for arg in each.args)
        if each.op == "element":
            extents = shapes[str(each.value)]
            outside += [_outside(*pair) for pair in zip(args, extents, strict=True) if not inside(*pair, num_heads)]
            args = tuple(
                index if inside(index, extent, num_heads) else _held(index, extent)
                for index, extent in zip(args, extents, strict=True)
            )
        known[each] = Term(each.op, each.dtype, args, each.value)
    return known[term], any_of(*outside)


def any_of(*conditions: Term | None) -> Term | None:
    """Whether one of some conditions holds; None where there is none."""
    present = [condition for condition in conditions if condition is not None]
    return functools.reduce(lambda one, other: Term("or", "bool", (one, other)), present) if present else None


def nan_where(condition: Term | None, score: Term | None) -> Term | None:
    """A score that is NaN where a condition holds; the score as it is where there is none."""
    if condition is None:
        return score
    return Term("where", "float32", (condition, _NAN, score or Term("score", "float32")))


def _held(index: Term, extent: int | str) -> Term:
    last = Term("subtract", "int32", (_extent(extent), _ONE)) if extent == BATCH else _number(int(extent) - 1)
    return Term("maximum", "int32", (Term("minimum", "int32", (index, last)), _ZERO))


def _outside(index: Term, extent: int | str) -> Term:
    below, within = Term("less", "bool", (index, _ZERO)), Term("less", "bool", (index, _extent(extent)))
    return Term("or", "bool", (below, Term("not", "bool", (within,))))


def _extent(extent: int | str) -> Term:
    return _BATCH_SIZE if extent == BATCH else _number(int(extent))


def _number(value: int) -> Term:
    return Term("number", "int32", (), value)
