"""Integer expressions of the length of a sequence: where the keys begin and end that its query token sees.

With several query tokens also of where the query token is. Sums of multiples of parts: of the length, of the query
token's place, of quotients, minima and maxima. They are what bounds.py makes of masks, what
kernels and hosts compute, and what explain prints. Imports no TVM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_LENGTH = 1 << 30
"""Tokens of a sequence, at most: every length is from 0 to this."""

_INT32 = (1 << 31) - 1
_NUMBERS = ("length", "query")  # parts that are given, each from 0 to MAX_LENGTH
_MOST_CHOICES = 6
"""Minima and maxima in an expression that low() takes apart, each of which doubles its work."""


class Part(NamedTuple):
    """What a sum has a multiple of.

    Attributes:
        op: "length"; "query", one more than the position of the query token; "floor_divide", of args[0] by `divisor`,
            rounded down; "minimum" and "maximum" of both args.
        args: Expressions that it takes.
        divisor: A positive number.
    """

    op: str
    args: tuple[Affine, ...] = ()
    divisor: int = 1


class Affine(NamedTuple):
    """The sum of `constant` and of the parts, each times its factor, which is not 0. Equal ones are the same sum."""

    constant: int
    parts: tuple[tuple[int, Part], ...] = ()


def constant(number: int) -> Affine:
    """A number."""
    return Affine(number)


LENGTH = Affine(0, ((1, Part("length")),))
"""context_lens[seq]; where a sequence has one query token, its last, that token's position is one less."""

QUERY_END = Affine(0, ((1, Part("query")),))
"""One more than the position of a query token that need not be the last token of its sequence."""


def add(first: Affine, second: Affine, factor: int = 1) -> Affine:
    """first + factor * second."""
    factors = {part: of for of, part in first.parts}
    for of, part in second.parts:
        factors[part] = factors.get(part, 0) + factor * of
    parts = sorted(
        ((of, part) for part, of in factors.items() if of), key=lambda each: (each[1].op not in _NUMBERS, each)
    )
    return Affine(first.constant + factor * second.constant, tuple(parts))


def multiply(expression: Affine, factor: int) -> Affine:
    """factor * expression."""
    return add(Affine(0), expression, factor)


def floor_divide(expression: Affine, divisor: int) -> Affine:
    """The quotient by a positive number, rounded down."""
    if all(factor % divisor == 0 for factor, _ in expression.parts):
        return Affine(
            expression.constant // divisor, tuple((factor // divisor, part) for factor, part in expression.parts)
        )
    return Affine(0, ((1, Part("floor_divide", (expression,), divisor)),))


def minimum(first: Affine, second: Affine) -> Affine:
    """The smaller one of two, without the other where it never is."""
    return _extreme("minimum", first, second)


def maximum(first: Affine, second: Affine) -> Affine:
    """The larger one of two, without the other where it never is."""
    return _extreme("maximum", first, second)


def _extreme(op: str, first: Affine, second: Affine) -> Affine:
    is_first_larger, is_second_larger = at_least(first, second), at_least(second, first)
    if is_first_larger or is_second_larger:
        return first if is_first_larger == (op == "maximum") else second
    return Affine(0, ((1, Part(op, tuple(sorted((first, second))))),))


def at_least(first: Affine, second: Affine) -> bool:
    """Whether first >= second can be proved for every length."""
    return low(add(first, second, -1)) >= 0


@functools.lru_cache(4096)
def low(expression: Affine) -> int:
    """A number that no value of the expression is below, for any length.

    The parts are bounded one by one; or one of them is replaced by what it is made of: n * (x // n) is from x - n + 1
    to x, and a minimum or a maximum is one of its two arguments.
    """
    plain = expression.constant
    for factor, part in expression.parts:
        least, most = _ends(part)
        plain += factor * (least if factor > 0 else most)
    for factor, part in expression.parts:
        if part.op in _NUMBERS or _choices(expression) > _MOST_CHOICES:
            continue
        others = add(expression, Affine(0, ((factor, part),)), -1)
        if part.op == "floor_divide":
            if factor % part.divisor == 0:
                rest = part.divisor - 1 if factor > 0 else 0
                replaced = add(others, add(part.args[0], Affine(-rest)), factor // part.divisor)
                return max(plain, low(replaced))
            continue
        both = [low(add(others, argument, factor)) for argument in part.args]
        return max(plain, max(both) if (part.op == "maximum") == (factor > 0) else min(both))
    return plain


def high(expression: Affine) -> int:
    """A number that no value of the expression is above, for any length."""
    return -low(multiply(expression, -1))


def _ends(part: Part) -> tuple[int, int]:
    if part.op in _NUMBERS:
        return 0, MAX_LENGTH
    lows, highs = [low(each) for each in part.args], [high(each) for each in part.args]
    if part.op == "floor_divide":
        return lows[0] // part.divisor, highs[0] // part.divisor
    choose = min if part.op == "minimum" else max
    return choose(lows), choose(highs)


def _choices(expression: Affine) -> int:
    return sum((part.op in ("minimum", "maximum")) + sum(map(_choices, part.args)) for _, part in expression.parts)


def size(expression: Affine) -> int:
    """Parts in it, those of its parts too."""
    return sum(1 + sum(map(size, part.args)) for _, part in expression.parts)


def fits(expression: Affine) -> bool:
    """Whether nothing that is computed on the way to its value leaves int32: kernels then have what hosts have."""
    sums = [Affine(0, expression.parts[:count]) for count in range(1, len(expression.parts) + 1)]
    products = [Affine(0, (each,)) for each in expression.parts]
    within = all(low(each) >= -_INT32 and high(each) <= _INT32 for each in (*sums, *products, expression))
    return within and all(fits(argument) for _, part in expression.parts for argument in part.args)


class Operations(NamedTuple):
    """What value() computes with, besides + and * and -: those of numbers, of NumPy or of TensorIR."""

    floor_divide: Callable[[Any, int], Any] = lambda dividend, divisor: dividend // divisor
    minimum: Callable[[Any, Any], Any] = min
    maximum: Callable[[Any, Any], Any] = max


def value(
    expression: Affine,
    length: Any,
    operations: Operations = Operations(),  # noqa: B008  (immutable)
    query_end: Any = None,
) -> Any:
    """Its value for a length, or for several as operations take them; an int where it depends on none.

    query_end is the value of QUERY_END, where the expression may have that.
    """
    total: Any = None
    for factor, part in expression.parts:
        if part.op in _NUMBERS:
            of = length if part.op == "length" else query_end
        else:
            arguments = [value(argument, length, operations, query_end) for argument in part.args]
            further = [part.divisor] if part.op == "floor_divide" else []
            of = getattr(operations, part.op)(*arguments, *further)
        term = of if factor == 1 else of * factor
        total = term if total is None else total + term
    if total is None:
        return expression.constant
    if expression.constant < 0:
        return total - -expression.constant
    return total + expression.constant if expression.constant else total


class Words(NamedTuple):
    """How text() writes what is not + and - and *, as formats."""

    length: str
    query: str
    floor_divide: str
    minimum: str
    maximum: str


CPP = Words("context_len", "query_end", "FloorDivide({}, {})", "std::min<int64_t>({}, {})", "std::max<int64_t>({}, {})")
"""In C++, where context_len and query_end are int64_t; for FloorDivide see templates/shared/window.h."""

PLAIN = Words("query_pos", "query_end", "({} // {})", "min({}, {})", "max({}, {})")
"""For readers, of an expression by_query_pos."""


def by_query_pos(expression: Affine) -> Affine:
    """The same, where the length in it is the position of the query token."""
    total = Affine(expression.constant)
    for factor, part in expression.parts:
        if part.op == "length":
            total = add(total, add(LENGTH, Affine(1)), factor)
        else:
            inside = part._replace(args=tuple(map(by_query_pos, part.args)))
            total = add(total, Affine(0, ((1, inside),)), factor)
    return total


def text(expression: Affine, words: Words) -> str:
    """The expression as it is written."""
    terms = [(factor < 0, _term(abs(factor), part, words)) for factor, part in expression.parts]
    if expression.constant or not terms:
        terms.append((expression.constant < 0, str(abs(expression.constant))))
    terms.sort(key=lambda each: each[0])  # those that are added come first
    (is_negative, first), *rest = terms
    return ("-" if is_negative else "") + first + "".join(f" {'-' if less else '+'} {term}" for less, term in rest)


def _term(factor: int, part: Part, words: Words) -> str:
    if part.op in _NUMBERS:
        said = getattr(words, part.op)
    else:
        arguments = [text(argument, words) for argument in part.args]
        if part.op == "floor_divide":
            if words is PLAIN and (size(part.args[0]) > 1 or part.args[0].constant):
                arguments[0] = f"({arguments[0]})"
            arguments.append(str(part.divisor))
        said = getattr(words, part.op).format(*arguments)
    return said if factor == 1 else f"{factor} * {said}"
