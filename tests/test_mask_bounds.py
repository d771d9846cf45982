"""Bounds of masks against the masks themselves, asked for every key of many lengths."""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import pytest
from specs import BASE

from pa_compiler.bounds import MOST_INTERVALS, affine, bounds, residual_mask
from pa_compiler.score import Function, Term

QUERY, KEY, HEAD = (Term(name, "int32") for name in ("query_pos", "key_pos", "head"))
LENGTHS = [*range(1, 140), 191, 192, 193, 255, 256, 257, 300]


def number(value):
    return Term("number", "bool" if isinstance(value, bool) else "int32", value=value)


def of(op, *args):
    is_bool = op in ("less", "less_equal", "equal", "not") or args[0].dtype == "bool" or args[-1].dtype == "bool"
    return Term(op, "bool" if is_bool else "int32", args)


def last(count):
    return of("less", of("subtract", QUERY, KEY), number(count))


def before(count):
    return of("less", KEY, number(count))


def block(term, size):
    return of("floor_divide", term, number(size))


OPERATIONS = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "negative": operator.neg,
    "absolute": np.abs,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "less": operator.lt,
    "less_equal": operator.le,
    "equal": operator.eq,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "where": np.where,
}


def evaluated(term, **arguments):
    """A term by NumPy, in int64."""
    if term.op == "number":
        return term.value
    if term.op in arguments:
        return arguments[term.op]
    return OPERATIONS[term.op](*(evaluated(each, **arguments) for each in term.args))


def spec_of(mask, **fields):
    return dataclasses.replace(BASE, mask_mod=Function(str(mask), mask), **fields)


def seen_by(mask, length, head, window=None):
    keys = np.arange(length)
    seen = np.broadcast_to(evaluated(mask, query_pos=np.int64(length - 1), key_pos=keys, head=np.int64(head)), length)
    return seen if window is None else seen & (keys >= length - window)


def within(intervals, length):
    """Which keys are in a union of intervals, and which are between the first and the last of these."""
    ends = [
        (max(affine.value(each.begin, length), 0), min(affine.value(each.end, length), length)) for each in intervals
    ]
    keys, ends = np.arange(length), [(begin, end) for begin, end in ends if begin < end]
    inside = np.zeros(length, bool)
    for begin, end in ends:
        inside |= (keys >= begin) & (keys < end)
    hull = (keys >= min(each[0] for each in ends)) & (keys < max(each[1] for each in ends)) if ends else inside
    return inside, hull


def check(mask, window=None):
    """The bounds of a mask hold for it, and what is left to be asked makes up for the rest."""
    spec = spec_of(mask, window=window)
    found, residual = bounds(spec), residual_mask(spec)
    assert len(found.intervals) <= MOST_INTERVALS
    assert all(affine.fits(end) for interval in found.intervals for end in interval)
    for length in LENGTHS:
        inside, hull = within(found.intervals, length)
        for head in (0, 1, 3):
            seen = seen_by(mask, length, head, window)
            assert not (seen & ~inside).any(), (length, found)
            if found.exact:
                np.testing.assert_array_equal(seen, inside, str((length, found)))
            asked = hull if residual is None else hull & seen_by(residual, length, head)
            if residual is None or len(found.intervals) == 1:
                np.testing.assert_array_equal(seen, asked, str((length, found, residual)))
            else:
                np.testing.assert_array_equal(seen, asked & inside, str((length, found, residual)))
    return found, residual


def said(found):
    return " and ".join(interval.text() for interval in found.intervals)


@pytest.mark.parametrize(
    ("mask", "words", "exact"),
    [
        (last(100), "query_pos - 99 .. query_pos", True),
        (of("less", of("subtract", KEY, QUERY), number(5)), "0 .. query_pos", True),
        (before(7), "0 .. 6", True),
        (of("or", before(4), last(64)), "0 .. 3 and query_pos - 63 .. query_pos", True),
        (of("equal", block(KEY, 64), block(QUERY, 64)), "64 * (query_pos // 64) .. query_pos", True),
        (of("and", last(50), of("equal", HEAD, number(3))), "query_pos - 49 .. query_pos", False),
        (of("less", number(30), KEY), "31 .. query_pos", True),
        (of("or", of("less_equal", KEY, QUERY), of("less", KEY, HEAD)), "0 .. query_pos", True),
        (of("not", of("less", of("absolute", of("subtract", QUERY, KEY)), number(40))), "0 .. query_pos - 40", True),
        (number(False), "", True),
    ],
    ids=["last", "causal", "first", "first_and_last", "chunk", "head", "late", "prefix", "far", "none"],
)
def test_what_bounds_say(mask, words, exact):
    found, _ = check(mask)
    assert (said(found), found.exact) == (words, exact)
