"""The conditions of a mask_mod, each as the intervals of key positions in which it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pa_compiler.bounds import affine
from pa_compiler.bounds.affine import MAX_LENGTH, Affine, add, constant, floor_divide, multiply
from pa_compiler.bounds.intervals import ALL, ANY, HIGHEST, LOWEST, NONE, Bounds, Interval, both, either, simplified
from pa_compiler.score import Term

_MOST_PARTS = 12
"""In what two arguments of an operation are made of, for its value to be one of the length."""


class _Sum(NamedTuple):
    """An int32 term as a sum of what depends on the length alone and of multiples of other terms, by their numbers."""

    known: Affine
    others: dict[int, int]


class Conditions:
    """The bounds of the conditions of one mask. Terms that are shared are looked at once.

    query_end is one more than the position of the query token.
    """

    def __init__(self, query_end: Affine) -> None:
        self._query_pos = add(query_end, constant(-1))
        self._numbers: dict[object, int] = {}
        self._terms: list[Term] = []  # by their numbers
        self._of: dict[tuple[int, bool], tuple[Term, Bounds]] = {}
        self._sums: dict[int, tuple[Term, _Sum]] = {}

    def of(self, condition: Term, holds: bool) -> Bounds:
        """Where a condition holds, or where it does not; at least there where that cannot be said."""
        key = id(condition), holds
        if key not in self._of:
            self._of[key] = condition, self._bounds(condition, holds)
        return self._of[key][1]

    def _bounds(self, condition: Term, holds: bool) -> Bounds:
        op, args = condition.op, condition.args
        if op == "number":
            return ALL if bool(condition.value) == holds else NONE
        if op == "not":
            return self.of(args[0], not holds)
        if op in ("and", "or"):
            join = both if (op == "and") == holds else either
            return join(self.of(args[0], holds), self.of(args[1], holds))
        if op == "where":
            return self._chosen(args[0], self.of(args[1], holds), self.of(args[2], holds))
        if op == "xor" or (op == "equal" and args[0].dtype == "bool"):
            same = holds == (op == "equal")
            return self._chosen(args[0], self.of(args[1], same), self.of(args[1], not same))
        if op in ("less", "less_equal", "equal") and args[0].dtype == "int32":
            first, second = self._sum(args[0]), self._sum(args[1])
            return self._compared(op, _plus(first, second, -1), holds)
        if op == "cast" and args[0].dtype == "int32":
            return self._compared("equal", self._sum(args[0]), not holds)
        return ANY

    def _chosen(self, condition: Term, if_true: Bounds, if_false: Bounds) -> Bounds:
        return either(both(self.of(condition, True), if_true), both(self.of(condition, False), if_false))

    def _compared(self, op: str, difference: _Sum, holds: bool) -> Bounds:
        """Of the comparison of a difference with 0."""
        if op == "equal":
            if holds:
                return self._between(difference, constant(0), constant(1))
            return either(self._between(difference, None, constant(0)), self._between(difference, constant(1), None))
        limit = constant(0 if op == "less" else 1)
        return self._between(difference, None, limit) if holds else self._between(difference, limit, None)

    def _between(self, total: _Sum, least: Affine | None, end: Affine | None) -> Bounds:
        """Where least <= total < end; None is no limit."""
        known, others = total
        if not others:
            return _where(known, least, end)
        if len(others) > 1:
            return ANY
        ((number, factor),) = others.items()
        least = least and add(least, known, -1)
        end = end and add(end, known, -1)
        if factor < 0:  # least <= -n x < end: x from -end + 1, in steps of n, to -least
            least, end = (
                end and add(constant(1), end, -1),
                least and add(constant(1), least, -1),
            )
        divisor = abs(factor)
        least, end = (each and floor_divide(add(each, constant(divisor - 1)), divisor) for each in (least, end))
        return self._atom(self._terms[number], least, end)

    def _atom(self, term: Term, least: Affine | None, end: Affine | None) -> Bounds:
        """Where least <= term < end."""
        op, args = term.op, term.args
        if op == "key_pos":
            begin, stop = least or LOWEST, end or HIGHEST
            if not (affine.fits(begin) and affine.fits(stop)):
                return ANY
            return simplified([Interval(begin, stop)], True)
        if op == "floor_divide" and (divisor := _positive(args[1])):
            return self._between(self._sum(args[0]), least and multiply(least, divisor), end and multiply(end, divisor))
        if op == "where":
            return self._chosen(args[0], *(self._between(self._sum(each), least, end) for each in args[1:]))
        if op not in ("absolute", "minimum", "maximum"):
            return ANY
        if op == "absolute":
            inner = self._sum(args[0])
            pair = inner, _plus(_Sum(constant(0), {}), inner, -1)
        else:
            pair = self._sum(args[0]), self._sum(args[1])
        from_least = [self._between(each, least, None) for each in pair]
        to_end = [self._between(each, None, end) for each in pair]
        is_least = op == "minimum"  # otherwise the term is the larger one of both
        return both((both if is_least else either)(*from_least), (either if is_least else both)(*to_end))

    def _sum(self, term: Term) -> _Sum:
        if id(term) not in self._sums:
            self._sums[id(term)] = term, self._taken_apart(term)
        return self._sums[id(term)][1]

    def _taken_apart(self, term: Term) -> _Sum:
        op, args = term.op, [self._sum(each) for each in term.args if each.dtype == "int32"]
        if op == "number" and term.dtype == "int32":
            return _Sum(constant(int(term.value or 0)), {})
        if op == "query_pos":
            return _Sum(self._query_pos, {})
        if op in ("add", "subtract"):
            return _plus(args[0], args[1], 1 if op == "add" else -1)
        if op == "negative":
            return _plus(_Sum(constant(0), {}), args[0], -1)
        if op == "multiply" and (found := [each for each in args if not each.others and not each.known.parts]):
            other = args[1] if found[0] is args[0] else args[0]
            return _plus(_Sum(constant(0), {}), other, found[0].known.constant)
        if op in ("minimum", "maximum", "floor_divide", "remainder", "absolute") and (known := _known(term, args)):
            return _Sum(known, {})
        return _Sum(constant(0), {self._number(term): 1})

    def _number(self, term: Term) -> int:
        """The same for equal terms."""
        key = term.op, term.dtype, term.value, *map(self._number, term.args)
        if key not in self._numbers:
            self._numbers[key] = len(self._terms)
            self._terms.append(term)
        return self._numbers[key]


def _known(term: Term, args: Sequence[_Sum]) -> Affine | None:
    """The value of a term whose arguments depend on the length alone."""
    if any(each.others for each in args) or sum(affine.size(each.known) for each in args) > _MOST_PARTS:
        return None
    first = args[0].known
    if term.op in ("floor_divide", "remainder"):
        if not (divisor := _positive(term.args[1])):
            return None
        quotient = floor_divide(first, divisor)
        return quotient if term.op == "floor_divide" else add(first, quotient, -divisor)
    second = multiply(first, -1) if term.op == "absolute" else args[1].known
    return (affine.minimum if term.op == "minimum" else affine.maximum)(first, second)


def _positive(term: Term) -> int | None:
    return number if term.op == "number" and (number := int(term.value or 0)) > 0 else None


def _plus(first: _Sum, second: _Sum, factor: int) -> _Sum:
    others = dict(first.others)
    for number, of in second.others.items():
        others[number] = others.get(number, 0) + factor * of
    return _Sum(add(first.known, second.known, factor), {number: of for number, of in others.items() if of})


def _where(known: Affine, least: Affine | None, end: Affine | None) -> Bounds:
    """Everything where least <= known < end, and else nothing: a condition on the length alone."""
    margins = [] if least is None else [add(add(known, least, -1), constant(1))]  # at least 1 where it holds
    margins += [] if end is None else [add(end, known, -1)]
    stop = HIGHEST
    for margin in margins:
        if affine.fits(margin):
            is_there = affine.minimum(affine.maximum(margin, constant(0)), constant(1))
            stop = affine.minimum(stop, multiply(is_there, MAX_LENGTH))
        else:
            return ANY
    return simplified([Interval(LOWEST, stop)], True)
