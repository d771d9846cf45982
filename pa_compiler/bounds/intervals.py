"""Unions of intervals of key positions: what is in both of two, and what is in either."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from pa_compiler.bounds import affine
from pa_compiler.bounds.affine import LENGTH, MAX_LENGTH, Affine, Words, add, at_least, constant

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
        intervals: Whose union has all of them; up to MOST_INTERVALS. They may overlap, and be empty.
        exact: Whether the union has no other keys.
    """

    intervals: tuple[Interval, ...]
    exact: bool


LOWEST, HIGHEST = constant(-MAX_LENGTH), constant(MAX_LENGTH)  # ends beyond every sequence
ALL, NONE = Bounds((Interval(LOWEST, HIGHEST),), True), Bounds((), True)
ANY = Bounds((Interval(LOWEST, HIGHEST),), False)  # not known


def is_interval(seen: Bounds) -> bool:
    """Whether they are one interval, which all its keys are seen of, or nothing."""
    return seen.exact and len(seen.intervals) <= 1


def _meet(first: Interval, second: Interval) -> Interval:
    return Interval(affine.maximum(first.begin, second.begin), affine.minimum(first.end, second.end))


def both(first: Bounds, second: Bounds) -> Bounds:
    """The keys that are in both."""
    meetings = [_meet(*pair) for pair in itertools.product(first.intervals, second.intervals)]
    return _shortened(simplified(meetings, first.exact and second.exact))


def either(first: Bounds, second: Bounds) -> Bounds:
    """The keys that are in one of them or in both."""
    for one, other in ((first, second), (second, first)):
        if one.exact and all(any(_is_within(each, of) for of in one.intervals) for each in other.intervals):
            return one
    return _shortened(simplified([*first.intervals, *second.intervals], first.exact and second.exact))


def is_short(seen: Bounds) -> bool:
    """Whether the ends of the intervals are few operations each."""
    return all(affine.size(each.begin) + affine.size(each.end) <= _MOST_PARTS for each in seen.intervals)


def _shortened(seen: Bounds) -> Bounds:
    return seen if is_short(seen) else ANY


def simplified(intervals: Sequence[Interval], exact: bool) -> Bounds:
    """Their union without those that are empty, or within another, for every length, and with few of them."""
    kept: list[Interval] = []
    for each in intervals:
        clipped = Interval(
            LOWEST if at_least(constant(0), each.begin) else each.begin,
            HIGHEST if at_least(each.end, LENGTH) else each.end,
        )
        if _is_empty(clipped) or any(_is_within(clipped, other) for other in kept):
            continue
        kept = [other for other in kept if not _is_within(other, clipped)] + [clipped]
    kept.sort(key=lambda each: (_sampled(each.begin), _sampled(each.end)))
    while len(kept) > MOST_INTERVALS:
        gaps = [_sampled(after.begin) - _sampled(before.end) for before, after in itertools.pairwise(kept)]
        at = gaps.index(min(gaps))
        before, after = kept[at : at + 2]
        joined = Interval(affine.minimum(before.begin, after.begin), affine.maximum(before.end, after.end))
        kept[at : at + 2], exact = [joined], False
    return Bounds(tuple(kept), exact or not kept)


def _sampled(end: Affine) -> int:
    return int(affine.value(end, _SAMPLE, query_end=_SAMPLE))


def _is_empty(interval: Interval) -> bool:
    """Whether no sequence has a key in it."""
    begin, end = interval
    return at_least(begin, end) or at_least(begin, LENGTH) or at_least(constant(0), end)


def _is_within(inner: Interval, outer: Interval) -> bool:
    return at_least(inner.begin, outer.begin) and at_least(outer.end, inner.end)


def narrowed(seen: Bounds, *within: Interval) -> Bounds:
    """What of them is within an interval; nothing, without one."""
    return simplified([_meet(*pair) for pair in itertools.product(seen.intervals, within)], seen.exact)
