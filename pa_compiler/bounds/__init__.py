"""Masks become bounds: between which positions the keys lie that a query token sees.

A mask_mod and a window become a union of intervals of key positions, whose ends are expressions of the sequence's
length (affine.py). The loops over tokens begin and end there. In decode the query token is the last of its sequence.
With many_tokens, as in attend, it need not be: ends then go by its position too, and the length is that up to which it
may see keys. What of a mask is no bound of a position, such as a condition on the head, makes the union wider than the
mask, never tighter; what remains to be asked of each key is residual_mask. In plain Python, because verification needs
the bounds in processes without TVM: garbage goes where they say that nothing is read.
"""

from __future__ import annotations

from pa_compiler.bounds.affine import LENGTH, QUERY_END, Affine, add, constant
from pa_compiler.bounds.intervals import (
    ALL,
    ANY,
    HIGHEST,
    LOWEST,
    MOST_INTERVALS,
    Bounds,
    Interval,
    both,
    is_interval,
    is_short,
    narrowed,
)
from pa_compiler.score import Term
from pa_compiler.spec import PagedAttentionSpec

__all__ = ["MOST_INTERVALS", "NO_KEYS", "Bounds", "Interval", "bounds", "in_words", "residual_mask"]

NO_KEYS = Interval(HIGHEST, LENGTH)
"""What is seen under a mask that is never True."""


def bounds(spec: PagedAttentionSpec, many_tokens: bool = False) -> Bounds:
    """The bounds of a spec's mask_mod and window; of a mask that was read from a library, without its term, any.

    There is one interval at least.
    """
    return _bounds_and_residual(spec, many_tokens)[0]


def residual_mask(spec: PagedAttentionSpec, many_tokens: bool = False) -> Term | None:
    """What of mask_mod is still to be asked of the keys between the first of the bounds and the last; None: nothing.

    Conditions of a conjunction that are an interval each are left out: every key between the ends fulfils them.
    """
    return _bounds_and_residual(spec, many_tokens)[1]


def in_words(spec: PagedAttentionSpec) -> str:
    """What bounds and residual_mask are, for readers."""
    found, residual = _bounds_and_residual(spec, many_tokens=False)
    if found.intervals == (NO_KEYS,):
        return "none: the mask is never True"
    keys = " and ".join(interval.text() for interval in found.intervals)
    rest = "what is left of the mask is asked of each of these" if residual else "nothing is left of the mask"
    return f"{keys}; other blocks are neither looked up nor read; {rest}"


def _bounds_and_residual(spec: PagedAttentionSpec, many_tokens: bool) -> tuple[Bounds, Term | None]:
    seen, rest, query_end = ALL, None, QUERY_END if many_tokens else LENGTH
    if spec.mask_mod is not None:
        seen, rest = ANY, spec.mask_mod.result
        if rest is not None:
            try:
                seen, rest = _of_mask(rest, query_end)
            except RecursionError:  # a mask of thousands of terms, one in another: its kernel asks all of it
                seen = ANY
    if spec.window is not None:
        seen = narrowed(seen, Interval(add(query_end, constant(-spec.window)), HIGHEST))
    ends = [
        Interval(constant(0) if begin == LOWEST else begin, LENGTH if end == HIGHEST else end)
        for begin, end in seen.intervals
    ]
    return Bounds(tuple(ends) or (NO_KEYS,), seen.exact), rest if ends else None


def _of_mask(mask: Term, query_end: Affine) -> tuple[Bounds, Term | None]:
    """Its bounds, and those conditions of the conjunction that it is that are not intervals."""
    from pa_compiler.bounds.conditions import Conditions  # most specs have no mask

    derivation = Conditions(query_end)
    conditions = [(condition, derivation.of(condition, True)) for condition in _conjuncts(mask)]
    seen, rest = ALL, None
    for condition, of in sorted(conditions, key=lambda each: is_interval(each[1])):
        if is_interval(of) and is_short(within := narrowed(seen, *of.intervals)):
            seen = within
            continue
        seen = seen._replace(exact=False) if is_interval(of) else both(seen, of)
        rest = condition if rest is None else Term("and", "bool", (rest, condition))
    return seen, None if is_interval(seen) else rest


def _conjuncts(mask: Term) -> list[Term]:
    if mask.op != "and":
        return [mask]
    return [each for argument in mask.args for each in _conjuncts(argument)]
