"""What is known of an index when a spec is made: the numbers that an int32 term can be."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy

from pa_compiler.score import BATCH, Term, parts

POSITIONS = 1 << 30
"""Positions in a sequence are less, and so are the numbers of sequences."""

_INT32 = (-(1 << 31), (1 << 31) - 1)

Range = tuple[int, int]


def interval(term: Term, num_heads: int) -> tuple[int | None, int | None]:
    """The least and the greatest number that an int32 term can be; None for an end of which nothing is known.

    A term that reads no argument but the head is computed for each head, so its ends are reached. Of others all numbers
    are inside of the interval, and its ends need not be reached.
    """
    exact = _for_each_head(term, num_heads)
    low, high = _bounds(term, num_heads) if exact is None else (int(exact.min()), int(exact.max()))
    return None if low == _INT32[0] else low, None if high == _INT32[1] else high


def inside(index: Term, extent: int | str, num_heads: int) -> bool:
    """Whether an index is at least 0 and less than the extent of its axis, whatever is computed.

    extent: BATCH for as many as the call has sequences.
    """
    if extent == BATCH:
        return index.op == "batch"
    low, high = interval(index, num_heads)
    return low is not None and high is not None and low >= 0 and high < int(extent)


def outside(index: Term, extent: int | str, num_heads: int) -> int | None:
    """A number that an index certainly becomes and that its axis does not have; None where none is known."""
    if extent == BATCH:
        return None
    exact = _for_each_head(index, num_heads)
    if exact is not None:
        numbers = exact.tolist()
    else:
        low, high = _bounds(index, num_heads)
        numbers = [low] if low >= int(extent) else [high] if high < 0 else []
    return next((each for each in numbers if not 0 <= each < int(extent)), None)


_EXACT: dict[str, Callable[..., Any]] = {
    "add": numpy.add,
    "subtract": numpy.subtract,
    "multiply": numpy.multiply,
    "negative": numpy.negative,
    "absolute": numpy.absolute,
    "minimum": numpy.minimum,
    "maximum": numpy.maximum,
    "floor_divide": numpy.floor_divide,
    "remainder": numpy.remainder,
    "less": numpy.less,
    "less_equal": numpy.less_equal,
    "equal": numpy.equal,
    "and": numpy.bitwise_and,
    "or": numpy.bitwise_or,
    "xor": numpy.bitwise_xor,
    "not": numpy.invert,
    "where": numpy.where,
}


def _for_each_head(term: Term, num_heads: int) -> Any:
    """The numbers of an int32 term for every head, int64; None where it reads something else, or divides by 0."""
    every = parts(term)
    if any(each.dtype == "float32" or each.op not in (*_EXACT, "head", "number", "cast") for each in every):
        return None
    known: dict[Term, Any] = {}
    for each in every:
        args = [known[arg] for arg in each.args]
        if each.op == "head":
            known[each] = numpy.arange(num_heads)
        elif each.op == "number":
            known[each] = numpy.array(each.value)
        elif each.op == "cast":
            known[each] = args[0] != 0 if each.dtype == "bool" else args[0].astype(numpy.int64)
        elif each.op in ("floor_divide", "remainder") and not args[1].all():
            return None
        else:
            known[each] = _EXACT[each.op](*args)
        if each.dtype == "int32":
            known[each] = (known[each].astype(numpy.int64) + (1 << 31)) % (1 << 32) - (1 << 31)  # as int32 wraps
    return known[term].reshape(-1)


def _bounds(term: Term, num_heads: int) -> Range:
    known: dict[Term, Range] = {}
    for each in parts(term):
        low, high = _bound(each, [known[arg] for arg in each.args], num_heads)
        known[each] = (low, high) if _INT32[0] <= low and high <= _INT32[1] else _INT32  # what wraps may be anything
    return known[term]


def _bound(term: Term, args: list[Range], num_heads: int) -> Range:
    """The ends of a term from those of its args. Nothing is known of float32."""
    if term.dtype == "bool":
        return 0, 1
    if term.dtype == "float32":
        return _INT32
    if term.op == "head":
        return 0, num_heads - 1
    if term.op in ("batch", "query_pos", "key_pos"):
        return 0, POSITIONS - 1
    if term.op == "number":
        return int(term.value or 0), int(term.value or 0)
    if term.op in _BOUNDS:
        return _BOUNDS[term.op](*args)
    if term.op == "cast" and term.args[0].dtype == "bool":
        return 0, 1
    return _INT32


def _corners(compute: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    """Of what is monotonic in each operand: its ends are at those of the operands."""

    def bound(left: Range, right: Range) -> Range:
        ends = [compute(one, other) for one in left for other in right]
        return min(ends), max(ends)

    return bound


def _absolute(arg: Range) -> Range:
    low, high = arg
    return 0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high))


def _floor_divide(left: Range, right: Range) -> Range:
    return _corners(operator.floordiv)(left, right) if right[0] > 0 or right[1] < 0 else _INT32


def _remainder(left: Range, right: Range) -> Range:
    if right[0] > 0:
        return left if left[0] >= 0 and left[1] < right[0] else (0, right[1] - 1)
    return (right[0] + 1, 0) if right[1] < 0 else _INT32


def _and(left: Range, right: Range) -> Range:
    highs = [high for low, high in (left, right) if low >= 0]
    return (0, min(highs)) if highs else _INT32


def _or(left: Range, right: Range) -> Range:
    bits = max(left[1], right[1]).bit_length()
    return (0, (1 << bits) - 1) if left[0] >= 0 and right[0] >= 0 else _INT32


_BOUNDS: dict[str, Callable[..., Range]] = {
    "add": _corners(operator.add),
    "subtract": _corners(operator.sub),
    "multiply": _corners(operator.mul),
    "minimum": _corners(min),
    "maximum": _corners(max),
    "negative": lambda arg: (-arg[1], -arg[0]),
    "not": lambda arg: (~arg[1], ~arg[0]),
    "absolute": _absolute,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "and": _and,
    "or": _or,
    "xor": _or,
    "where": lambda condition, yes, no: (min(yes[0], no[0]), max(yes[1], no[1])),
}
