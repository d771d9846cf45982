"""Masks become bounds: between which positions the keys lie that a query token sees.

A mask_mod and a window become a union of intervals of key positions, whose ends are expressions of the sequence's length
(affine.py). The loops over tokens begin and end there. What of a mask is no bound of a position, such as a condition on
the head, makes the union wider than the mask, never tighter; what remains to be asked of each key is residual_mask. In
plain Python, because verification needs the bounds in processes without TVM: garbage goes where they say that nothing
is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from pa_compiler import affine
from pa_compiler.affine import LENGTH, MAX_LENGTH, Affine, Words, add, at_least, constant, floor_divide, multiply
from pa_compiler.score import Term
from pa_compiler.spec import PagedAttentionSpec

MOST_INTERVALS = 4
"""Of a union. Neighbours of more are joined."""

_MOST_PARTS = 48
"""In both ends of an interval; one with more becomes wider."""

_SAMPLE = 1 << 20
"""A length by which intervals are put in order, to see which are neighbours."""


class Interval(NamedTuple):
    """Key positions from `begin` to `end` - 1, as far as there are any between 0 and the sequence's length."""

    begin: Affine
    end: Affine

    def text(self, words: Words = affine.PLAIN) -> str:
        """The first and the last position, for readers."""
        first, last = affine.by_query_pos(self.begin), affine.by_query_pos(add(self.end, constant(-1)))
        return f"{affine.text(first, words)} .. {affine.text(last, words)}"


class Bounds(NamedTuple):
    """Where the keys are that a query token sees.

    Attributes:
        intervals: Whose union has all of them; up to MOST_INTERVALS. They may overlap, and be empty. None: it sees no key.
        exact: Whether the union has no other keys.
    """

    intervals: tuple[Interval, ...]
    exact: bool


WHOLE = Interval(constant(0), LENGTH)
_ALL, _NONE = Bounds((WHOLE,), True), Bounds((), True)
_ANY = Bounds((WHOLE,), False)  # not known


def bounds(spec: PagedAttentionSpec) -> Bounds:
    """The bounds of a spec's mask_mod and window; of a mask that was read from a library, without its term, any."""
    return _bounds_and_residual(spec)[0]


def residual_mask(spec: PagedAttentionSpec) -> Term | None:
    """What of mask_mod is still to be asked of the keys between the first of the bounds and the last; None: nothing.

    Conditions of a conjunction that are an interval each are left out: every key between the ends fulfils them.
    """
    return _bounds_and_residual(spec)[1]


def _bounds_and_residual(spec: PagedAttentionSpec) -> tuple[Bounds, Term | None]:
    seen, rest = _ALL, None
    if spec.mask_mod is not None:
        seen, rest = _ANY, spec.mask_mod.result
        if rest is not None:
            try:
                seen, rest = _of_mask(rest)
            except RecursionError:  # a mask of thousands of terms, one in another: its kernel asks all of it
                seen = _ANY
    if spec.window is not None:
        seen = _narrowed(seen, Interval(add(LENGTH, constant(-spec.window)), LENGTH))
    return seen, rest if seen.intervals else None


def _of_mask(mask: Term) -> tuple[Bounds, Term | None]:
    """Its bounds, and those conditions of the conjunction that it is that are not intervals."""
    derivation = _Derivation()
    conditions = [(condition, derivation.of(condition, True)) for condition in _conjuncts(mask)]
    conditions.sort(key=lambda each: _is_interval(each[1]))
    seen, rest = _ALL, None
    for condition, of in conditions:
        narrowed = _narrowed(seen, *of.intervals) if _is_interval(of) else None
        if narrowed is None or not _is_short(narrowed):
            seen, rest = _both(seen, of), Term("and", "bool", (rest, condition)) if rest else condition
        else:
            seen = narrowed
    return seen, rest


def _narrowed(seen: Bounds, *within: Interval) -> Bounds:
    """What of them is within an interval; nothing, without one."""
    return _simplified([_meet(*pair) for pair in itertools.product(seen.intervals, within)], seen.exact)


def _is_interval(seen: Bounds) -> bool:
    return seen.exact and len(seen.intervals) <= 1


def _conjuncts(mask: Term) -> list[Term]:
    if mask.op != "and":
        return [mask]
    return [each for argument in mask.args for each in _conjuncts(argument)]


def _meet(first: Interval, second: Interval) -> Interval:
    return Interval(affine.maximum(first.begin, second.begin), affine.minimum(first.end, second.end))


def _both(first: Bounds, second: Bounds) -> Bounds:
    """The keys that are in both."""
    meetings = [_meet(*pair) for pair in itertools.product(first.intervals, second.intervals)]
    return _shortened(_simplified(meetings, first.exact and second.exact))


def _either(first: Bounds, second: Bounds) -> Bounds:
    """The keys that are in one of them or in both."""
    for one, other in ((first, second), (second, first)):
        if one.exact and all(any(_is_within(each, of) for of in one.intervals) for each in other.intervals):
            return one
    return _shortened(_simplified([*first.intervals, *second.intervals], first.exact and second.exact))


def _is_short(seen: Bounds) -> bool:
    return all(affine.size(each.begin) + affine.size(each.end) <= _MOST_PARTS for each in seen.intervals)


def _shortened(seen: Bounds) -> Bounds:
    return seen if _is_short(seen) else _ANY


def _simplified(intervals: Sequence[Interval], exact: bool) -> Bounds:
    """Their union without those that are empty, or within another, for every length, and with few of them."""
    kept: list[Interval] = []
    for each in intervals:
        clipped = Interval(
            constant(0) if at_least(constant(0), each.begin) else each.begin,
            LENGTH if at_least(each.end, LENGTH) else each.end,
        )
        if at_least(clipped.begin, clipped.end) or any(_is_within(clipped, other) for other in kept):
            continue
        kept = [other for other in kept if not _is_within(other, clipped)] + [clipped]
    kept.sort(key=lambda each: (affine.value(each.begin, _SAMPLE), affine.value(each.end, _SAMPLE)))
    while len(kept) > MOST_INTERVALS:
        gaps = [
            affine.value(after.begin, _SAMPLE) - affine.value(before.end, _SAMPLE)
            for before, after in itertools.pairwise(kept)
        ]
        at = gaps.index(min(gaps))
        before, after = kept[at : at + 2]
        joined = Interval(affine.minimum(before.begin, after.begin), affine.maximum(before.end, after.end))
        kept[at : at + 2], exact = [joined], False
    return Bounds(tuple(kept), exact or not kept)


def _is_within(inner: Interval, outer: Interval) -> bool:
    return at_least(inner.begin, outer.begin) and at_least(outer.end, inner.end)


class _Sum(NamedTuple):
    """An int32 term as a sum of what depends on the length alone and of multiples of other terms, by their numbers."""

    known: Affine
    others: dict[int, int]


class _Derivation:
    """The bounds of the conditions of one mask. Terms that are shared are looked at once."""

    def __init__(self) -> None:
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
            return _ALL if bool(condition.value) == holds else _NONE
        if op == "not":
            return self.of(args[0], not holds)
        if op in ("and", "or"):
            join = _both if (op == "and") == holds else _either
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
        return _ANY

    def _chosen(self, condition: Term, if_true: Bounds, if_false: Bounds) -> Bounds:
        return _either(_both(self.of(condition, True), if_true), _both(self.of(condition, False), if_false))

    def _compared(self, op: str, difference: _Sum, holds: bool) -> Bounds:
        """Of the comparison of a difference with 0."""
        if op == "equal":
            if holds:
                return self._between(difference, constant(0), constant(1))
            return _either(self._between(difference, None, constant(0)), self._between(difference, constant(1), None))
        limit = constant(0 if op == "less" else 1)
        return self._between(difference, None, limit) if holds else self._between(difference, limit, None)

    def _between(self, total: _Sum, least: Affine | None, end: Affine | None) -> Bounds:
        """Where least <= total < end; None is no limit."""
        known, others = total
        if not others:
            return _where(known, least, end)
        if len(others) > 1:
            return _ANY
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
            begin, stop = least or constant(0), end or LENGTH
            if not (affine.fits(begin) and affine.fits(stop)):
                return _ANY
            return _simplified([Interval(begin, stop)], True)
        if op == "floor_divide" and (divisor := _positive(args[1])):
            return self._between(self._sum(args[0]), least and multiply(least, divisor), end and multiply(end, divisor))
        if op == "where":
            return self._chosen(args[0], *(self._between(self._sum(each), least, end) for each in args[1:]))
        if op not in ("absolute", "minimum", "maximum"):
            return _ANY
        if op == "absolute":
            inner = self._sum(args[0])
            both = inner, _plus(_Sum(constant(0), {}), inner, -1)
        else:
            both = self._sum(args[0]), self._sum(args[1])
        from_least = [self._between(each, least, None) for each in both]
        to_end = [self._between(each, None, end) for each in both]
        is_least = op == "minimum"  # otherwise the term is the larger one of both
        return _both((_both if is_least else _either)(*from_least), (_either if is_least else _both)(*to_end))

    def _sum(self, term: Term) -> _Sum:
        if id(term) not in self._sums:
            self._sums[id(term)] = term, self._taken_apart(term)
        return self._sums[id(term)][1]

    def _taken_apart(self, term: Term) -> _Sum:
        op, args = term.op, [self._sum(each) for each in term.args if each.dtype == "int32"]
        if op == "number" and term.dtype == "int32":
            return _Sum(constant(int(term.value or 0)), {})
        if op == "query_pos":
            return _Sum(add(LENGTH, constant(-1)), {})
        if op in ("add", "subtract"):
            return _plus(*args, factor=1 if op == "add" else -1)
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
    if any(each.others for each in args) or sum(affine.size(each.known) for each in args) > _MOST_PARTS // 4:
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
    return int(term.value) if term.op == "number" and term.value is not None and term.value > 0 else None


def _plus(first: _Sum, second: _Sum, factor: int) -> _Sum:
    others = dict(first.others)
    for number, of in second.others.items():
        others[number] = others.get(number, 0) + factor * of
    return _Sum(add(first.known, second.known, factor), {number: of for number, of in others.items() if of})


def _where(known: Affine, least: Affine | None, end: Affine | None) -> Bounds:
    """Everything where least <= known < end, and else nothing: a condition on the length alone."""
    margins = [] if least is None else [add(add(known, least, -1), constant(1))]  # at least 1 where it holds
    margins += [] if end is None else [add(end, known, -1)]
    stop = LENGTH
    for margin in margins:
        if affine.fits(margin):
            is_there = affine.minimum(affine.maximum(margin, constant(0)), constant(1))
            stop = affine.minimum(stop, multiply(is_there, MAX_LENGTH))
        else:
            return _ANY
    return _simplified([Interval(constant(0), stop)], True)
