"""How far what float32 makes of a score_mod may be from its value: interval arithmetic on its term, in float64.

Each operation takes intervals that hold what a kernel may have, and gives one that does: wider by the operation's own
rounding, but where both ends are the same number and float32 holds the result, which is then exact. So jumps, as of
floor or of a comparison, are as wide as they are where a score is near one, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pa_compiler.score import Term, parts

ROUNDING = 2.0**-24
"""Of float32: the relative error of one operation."""

FUNCTION_ERROR = 5e-7
"""Relative error of exp, log, tanh and sigmoid in the kernels, at most, as these say of themselves."""

SMALLEST_NORMAL = 2.0**-126
"""Below it results may be anything down to 0."""

_MONOTONE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(x / 2)),
}
_EXACT: dict[str, Callable[..., np.ndarray]] = {"minimum": np.minimum, "maximum": np.maximum}
_BITS: dict[str, Callable[..., np.ndarray]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class Interval(NamedTuple):
    """The least and the largest that a number may be; of a bool 0 and 1 where it is not known."""

    low: np.ndarray
    high: np.ndarray


def error_bound(
    result: Term,
    exact: np.ndarray,
    arguments: Mapping[str, np.ndarray],
    of_score: np.ndarray,
    arrays: Mapping[str, np.ndarray],
) -> np.ndarray:
    """How far from its exact value a score_mod may be in float32; infinite where nothing is known.

    It is never more than what two results can be apart, so that a term that is not what the function computes widens
    nothing.

    Args:
        result: What it computes.
        exact: Its value in float64.
        arguments: "score", in float64, of the shape of exact, and the positions, int64; they broadcast.
        of_score: The bound on the error of each score.
        arrays: Inputs and constants by their names.
    """
    found: dict[Term, Interval] = {}
    with np.errstate(all="ignore"):
        for term in parts(result):
            if term.op == "score":
                score = arguments["score"]
                found[term] = Interval(score - of_score, score + of_score)
            elif term.op in arguments:
                found[term] = Interval(*2 * (np.asarray(arguments[term.op], np.float64),))
            else:
                found[term] = _computed(term, [found[each] for each in term.args], arrays)
        low, high = found[result]
        bound = np.minimum(np.maximum(high - exact, exact - low), high - low)
    return np.where(np.isnan(bound), np.where(low == high, 0.0, np.inf), bound)


def _computed(term: Term, args: list[Interval], arrays: Mapping[str, np.ndarray]) -> Interval:
    op = term.op
    if op == "number":
        return Interval(*2 * (np.float64(term.value),))
    if op == "element":
        return _element(arrays[str(term.value)], args)
    if op == "where":
        return _where(*args)
    if op in ("less", "less_equal", "equal"):
        return _compared(op, *args)
    if op in (*_BITS, "not"):
        return _of_bits(term, args)
    if op == "cast":
        return _cast(term, args[0])
    if op in ("floor", "negative", "absolute", *_EXACT):
        return _hull(*_corners(_plain(op), args), crossing=op == "absolute" and args[0])
    corners = _corners(_plain(op), args)
    if op in ("floor_divide", "remainder"):
        corners += _wraps(op, args)
    interval = _hull(*corners)
    return interval if term.dtype == "int32" else _rounded(interval, op in _MONOTONE and op != "sqrt")


def _plain(op: str) -> Callable[..., np.ndarray]:
    """An operation of float64."""
    others = {"divide": np.divide, "floor_divide": np.floor_divide, "remainder": np.remainder, "floor": np.floor}
    others |= {"add": np.add, "subtract": np.subtract, "multiply": np.multiply}
    others |= {"negative": np.negative, "absolute": np.absolute}
    return (_MONOTONE | _EXACT | others)[op]


def _corners(function: Callable[..., np.ndarray], args: list[Interval]) -> list[np.ndarray]:
    """The function of all ends: what it has between them lies between, where it is monotone in each."""
    if len(args) == 1:
        return [function(end) for end in args[0]]
    return [function(one, other) for one in args[0] for other in args[1]]


def _hull(*numbers: np.ndarray, crossing: Interval | bool = False) -> Interval:
    low, high = numbers[0], numbers[0]
    for each in numbers[1:]:
        low, high = np.minimum(low, each), np.maximum(high, each)
    if isinstance(crossing, Interval):
        low = np.where((crossing.low < 0) & (crossing.high > 0), 0.0, low)
    return Interval(low, high)


def _wraps(op: str, args: list[Interval]) -> list[np.ndarray]:
    """What a remainder may be where the quotient is not known, and a quotient where the divisor may be 0."""
    (low, high), (of_low, of_high) = args
    if op == "floor_divide":
        unknown = (of_low < 0) & (of_high > 0)
        return [np.where(unknown, -np.inf, np.floor(low / of_low)), np.where(unknown, np.inf, np.floor(low / of_low))]
    same = (np.floor(low / of_low) == np.floor(high / of_high)) & (of_low == of_high)
    inner = np.remainder(low, of_low)
    larger = np.where(np.abs(of_low) > np.abs(of_high), of_low, of_high)
    return [np.where(same, inner, 0.0), np.where(same, inner, larger)]


def _rounded(interval: Interval, approximate: bool) -> Interval:
    low, high = interval
    with np.errstate(over="ignore"):
        is_exact = (low == high) & (low.astype(np.float32) == low) & (not approximate)
    error = (FUNCTION_ERROR if approximate else ROUNDING) * np.maximum(np.abs(low), np.abs(high)) + SMALLEST_NORMAL
    error = np.where(is_exact | ((low == high) & (low == 0)), 0.0, error)
    return Interval(low - error, high + error)


def _element(array: np.ndarray, indices: list[Interval]) -> Interval:
    """NaN where an index is outside. An index that is not known takes all elements between its two ends' as known."""
    ends = []
    for at in zip(*indices, strict=True):
        held, outside = [], np.zeros((), bool)
        for index, extent in zip(at, array.shape, strict=True):
            outside = outside | ~((index >= 0) & (index < extent))
            held.append(np.clip(np.nan_to_num(index), 0, extent - 1).astype(np.int64))
        ends.append(np.where(outside, np.nan, array[tuple(held)].astype(np.float64)))
    return _hull(*ends)


def _where(condition: Interval, one: Interval, other: Interval) -> Interval:
    both = _hull(*one, *other)
    ends = zip(both, one, other, strict=True)
    low, high = (np.where(condition.low == 1, a, np.where(condition.high == 0, b, hull)) for hull, a, b in ends)
    return Interval(low, high)


def _compared(op: str, one: Interval, other: Interval) -> Interval:
    if op == "equal":
        sure = (one.low == one.high) & (other.low == other.high) & (one.low == other.low)
        maybe = (one.low <= other.high) & (other.low <= one.high)
    elif op == "less":
        sure, maybe = one.high < other.low, one.low < other.high
    else:
        sure, maybe = one.high <= other.low, one.low <= other.high
    return Interval(sure.astype(np.float64), maybe.astype(np.float64))


def _of_bits(term: Term, args: list[Interval]) -> Interval:
    """Of bool, all that the ends give; of int32, whose ends are the same unless they come of a score, that too."""
    dtype = bool if term.dtype == "bool" else np.int64

    def function(*ends: np.ndarray) -> np.ndarray:
        whole = [end.astype(dtype) for end in ends]
        return (np.invert(whole[0]) if term.op == "not" else _BITS[term.op](*whole)).astype(np.float64)

    return _hull(*_corners(function, args))


def _cast(term: Term, given: Interval) -> Interval:
    source = term.args[0].dtype
    if term.dtype == "bool":
        sure = (given.low > 0) | (given.high < 0)
        return Interval(sure.astype(np.float64), ((given.low != 0) | (given.high != 0)).astype(np.float64))
    if term.dtype == "int32":
        return Interval(np.trunc(given.low), np.trunc(given.high))
    return given if source == "bool" else _rounded(given, False)
