"""The text of a term: what a function of scores is known by, and what people read of it."""

from __future__ import annotations

import struct

from pa_compiler.score import Term, parts

_INFIX = {
    "less": ("<", 0),
    "less_equal": ("<=", 0),
    "equal": ("==", 0),
    "or": ("|", 1),
    "xor": ("^", 2),
    "and": ("&", 3),
    "add": ("+", 4),
    "subtract": ("-", 4),
    "multiply": ("*", 5),
    "divide": ("/", 5),
    "floor_divide": ("//", 5),
    "remainder": ("%", 5),
}
"""Operators with how strongly they bind, as Python has them."""

_PREFIX = {"negative": "-", "not": "~"}
_UNARY, _ATOM = 6, 7


def text(term: Term) -> str:
    """A term in one line, in the words of Python and NumPy: terms of the same text are the same.

    What is used more than once comes first, with a name: "t0 = query_pos - key_pos; where(t0 < 128, score, -inf)".
    Numbers of float32 have a point, an exponent or a word, in the fewest digits that say which they are; those of int32
    have none. Elements have brackets, so that no array can be taken for something else, whatever its name.
    """
    uses: dict[Term, int] = {}
    every = parts(term)
    for each in every:
        for arg in each.args:
            uses[arg] = uses.get(arg, 0) + 1
    said: dict[Term, tuple[str, int]] = {}
    named: list[str] = []
    for each in every:
        words, binding = _say(each, [said[arg] for arg in each.args])
        if each.args and uses.get(each, 0) > 1:
            name = f"t{len(named)}"
            named.append(f"{name} = {words}; ")
            words, binding = name, _ATOM
        said[each] = words, binding
    return "".join(named) + said[term][0]


def _say(term: Term, args: list[tuple[str, int]]) -> tuple[str, int]:
    """The words of a term and how strongly they bind, from those of its args."""
    inside = ", ".join(words for words, _ in args)
    if term.op in _INFIX:
        sign, binding = _INFIX[term.op]
        left, right = args
        # Comparisons do not follow one another: Python would take that for a chain.
        return f"{_at_least(left, binding or 1)} {sign} {_at_least(right, binding + 1)}", binding
    if term.op in _PREFIX:
        return _PREFIX[term.op] + _at_least(args[0], _ATOM), _UNARY
    if term.op == "number":
        words = _float32(float(term.value or 0)) if term.dtype == "float32" else str(term.value)
        return words, _UNARY if words.startswith("-") else _ATOM
    if term.op == "element":
        return f"{term.value}[{inside or '()'}]", _ATOM
    if term.op == "cast":
        return f"{term.dtype}({inside})", _ATOM
    return f"{term.op}({inside})" if args else term.op, _ATOM


def _at_least(said: tuple[str, int], binding: int) -> str:
    words, own = said
    return words if own >= binding else f"({words})"


def _float32(value: float) -> str:
    bits = struct.pack("<f", value)
    return next(
        repr(each)
        for each in (float(f"{value:.{digits}g}") for digits in range(1, 10))
        if _packed(each) in (bits, None)
    )


def _packed(value: float) -> bytes | None:
    """The bits of a number as float32; None of NaN, of which there are many."""
    try:
        return struct.pack("<f", value) if value == value else None
    except OverflowError:  # the largest numbers, rounded up
        return b""
