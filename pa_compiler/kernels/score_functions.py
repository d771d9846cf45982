"""The score_mod and the mask_mod of a spec, taken apart: what of them is computed for a column, a row, or each score.

A term that does not go by the head is computed once for a tile of tokens, for all heads, in vectors of columns; one
that goes neither by the key nor by the score, once for a row.
"""

from __future__ import annotations

from collections.abc import Mapping

from pa_compiler.kernels.indices import any_of, held_inside, nan_where
from pa_compiler.kernels.terms import subterms
from pa_compiler.score import ARGUMENTS, Term
from pa_compiler.spec import PagedAttentionSpec


def residual(spec: PagedAttentionSpec) -> Term | None:
    """What is left of the mask where bounds have said what they can: the condition under which a key is seen."""
    return None if spec.mask_mod is None else spec.mask_mod.result


class ScoreFunctions:
    """The functions of a spec. All of it is empty where a spec has none.

    Two of the same spec have the same terms in the same order, so each stage makes its own.

    Attributes:
        score: score_mod's term; NaN where an index of it or of the mask is outside of an array. None where scores stay
            as they are.
        mask: mask_mod's term. None where all keys are seen.
        by_row: Whether the mask goes by the head.
        columns: Terms that are computed once for a column, for all heads.
        score_rows, mask_rows: Terms that are computed once for a row, for either.
        arrays, mask_arrays: The names of the arrays that are read, by both and by the mask.
    """

    def __init__(self, spec: PagedAttentionSpec) -> None:
        shapes = {each.name: each.shape for each in (*spec.inputs, *spec.constants)}
        mask, outside_of_mask = _held(residual(spec), shapes, spec.num_heads)
        score, outside = _held(spec.score_mod and spec.score_mod.result, shapes, spec.num_heads)
        self.score = nan_where(any_of(outside, outside_of_mask), score)
        self.mask = mask and any_of(mask, outside_of_mask)
        self.by_row = self.mask is not None and "head" in _arguments(self.mask)[id(self.mask)]
        columns, self.score_rows = _parts(self.score)
        of_mask, self.mask_rows = _parts(self.mask) if self.by_row else ((), ())
        self.columns = tuple({id(each): each for each in (*columns, *of_mask)}.values())
        self.mask_arrays = _names(self.mask, shapes)
        self.arrays = _names(self.score, shapes) | self.mask_arrays

    @property
    def present(self) -> bool:
        """Whether there is any."""
        return self.score is not None or self.mask is not None

    @property
    def any_columns(self) -> bool:
        """Whether anything is computed once for a column."""
        return bool(self.columns) or (self.mask is not None and not self.by_row)


def _held(
    term: Term | None, shapes: Mapping[str, tuple[int | str, ...]], num_heads: int
) -> tuple[Term | None, Term | None]:
    return (None, None) if term is None else held_inside(term, shapes, num_heads)


def _arguments(term: Term) -> dict[int, frozenset[str]]:
    """Of every subterm, by its id, the arguments that it goes by."""
    found: dict[int, frozenset[str]] = {}
    for each in subterms(term):
        own = frozenset({each.op} & {"score", *ARGUMENTS})
        found[id(each)] = own.union(*(found[id(arg)] for arg in each.args))
    return found


def _parts(term: Term | None) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """The largest subterms that are computed once for a column, and once for a row.

    What is an argument of every row is none; what stands in a column, the position of its key, is one.
    """
    columns: dict[int, Term] = {}
    rows: dict[int, Term] = {}
    pending = [] if term is None else [term]
    goes_by = {} if term is None else _arguments(term)
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        arguments = goes_by[id(each)]
        if "score" not in arguments and "key_pos" not in arguments:
            if each.args:
                rows[id(each)] = each
        elif not arguments & {"score", "head"}:
            columns[id(each)] = each
        else:
            pending += reversed(each.args)
    return tuple(columns.values()), tuple(rows.values())


def _names(term: Term | None, names: Mapping[str, object]) -> frozenset[str]:
    """The arrays that a term reads."""
    return (
        frozenset()
        if term is None
        else frozenset(str(each.value) for each in subterms(term) if each.op == "element") & names.keys()
    )
