"""The score_mod and the mask_mod of a spec, taken apart: what of them is computed for a column, a row, or each score.

A term that does not go by the head is computed once for a tile of tokens, for all heads, in vectors of columns; one
that goes neither by the key nor by the score, once for a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pa_compiler.bounds import residual_mask
from pa_compiler.kernels.indices import any_of, held_inside, nan_where
from pa_compiler.score import ARGUMENTS, Term, names_read, parts
from pa_compiler.spec import PagedAttentionSpec


class ScoreFunctions:
    """The functions of a spec. All of it is empty where a spec has none.

    Two of the same spec have the same terms in the same order, so each stage makes its own. many_tokens and attends are
    a Tiling's.

    Attributes:
        score: score_mod's term; NaN where an index of it or of the mask is outside of an array. None where scores stay
            as they are.
        mask: What bounds leave of mask_mod's term. None where all keys between them are seen.
        by_row: Whether the mask goes by the head; or, with many_tokens, as rows have several query tokens, by theirs.
        columns: Terms that are computed once for a column, for all heads.
        score_rows, mask_rows: Terms that are computed once for a row, for either.
        score_steps, mask_steps: Terms that are computed before either, for each score: parts of what would be too long
            for one expression. Columns and rows have such steps too, before what is made of them.
        arrays: The names of the arrays that are read.
        num_heads: Query heads.
    """

    def __init__(
        self, spec: PagedAttentionSpec, *, only_mask: bool = False, many_tokens: bool = False, attends: bool = False
    ) -> None:
        shapes = {each.name: each.shape for each in (*spec.inputs, *spec.constants)}
        mask, outside_of_mask = _held(residual_mask(spec, many_tokens or attends), shapes, spec.num_heads)
        score, outside = _held(spec.score_mod and spec.score_mod.result, shapes, spec.num_heads)
        self.score = None if only_mask else nan_where(any_of(outside, outside_of_mask), score)
        self.mask = mask
        of_row = frozenset({"head", "query_pos"} if many_tokens else {"head"})
        self.by_row = self.mask is not None and bool(of_row & _arguments(self.mask)[self.mask])
        columns, score_rows = _parts(self.score, of_row)
        of_mask, mask_rows = _parts(self.mask if self.by_row else None, of_row)
        by_column = [] if self.by_row else _steps(self.mask, ())
        self.columns = _in_steps(*columns, *of_mask, *by_column)
        self.score_rows, self.mask_rows = _in_steps(*score_rows), _in_steps(*mask_rows)
        of_score = 2 if spec.softcap is None else 240
        self.score_steps = _steps(self.score, {*self.columns, *self.score_rows}, of_score)
        self.mask_steps = _steps(self.mask, {*self.columns, *self.mask_rows}) if self.by_row else []
        self.arrays = _names(self.score, self.mask)
        self.num_heads = spec.num_heads

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


def _arguments(term: Term) -> dict[Term, frozenset[str]]:
    """The arguments that each of its parts goes by."""
    found: dict[Term, frozenset[str]] = {}
    for each in parts(term):
        own = frozenset({each.op} & {"score", *ARGUMENTS})
        found[each] = own.union(*(found[arg] for arg in each.args))
    return found


def _parts(term: Term | None, of_row: frozenset[str]) -> tuple[list[Term], list[Term]]:
    """The largest parts that are computed once for a column, and once for a row.

    What is an argument of every row is none; what stands in a column, the position of its key, is one.
    """
    columns: list[Term] = []
    rows: list[Term] = []
    if term is None:
        return columns, rows
    goes_by, wanted = _arguments(term), {term}
    for each in reversed(parts(term)):
        if each not in wanted:
            continue
        if not goes_by[each] & {"score", "key_pos"}:
            rows += [each] if each.args else []
        elif not goes_by[each] & {"score", *of_row}:
            columns.append(each)
        else:
            wanted.update(each.args)
    return columns, rows


_LONGEST = 2000
"""Operations of an expression, at most. TVM's passes put the value of a variable into what it is used for, so that an
operand counts as often as it is used; of what is read from memory they know nothing."""

_OPERATIONS = {"exp": (150, 25), "log": (200, 40), "tanh": (150, 85), "sigmoid": (400, 150), "floor": (20, 6)}
_OPERATIONS |= {"floor_divide": (30, 8), "remainder": (30, 10), "absolute": (2, 3), "equal": (1, 2), "xor": (1, 2)}
"""About how many operations a function is made of, and how often its operand is in them."""


def _steps(term: Term | None, kept: Collection[Term], of_score: int = 1) -> list[Term]:
    """The parts of a term that are kept for its expression not to become too long, after those that they take.

    of_score: Operations that the score is made of.
    """
    steps: list[Term] = []
    sizes = dict.fromkeys(kept, 1)
    for each in [] if term is None else parts(term):
        if each in kept or not each.args:
            sizes[each] = of_score if each.op == "score" else 1
            continue
        operations, times = _OPERATIONS.get(each.op, (1, 1))
        sizes[each] = operations + sum(times * sizes[arg] for arg in each.args)
        if sizes[each] > _LONGEST:
            longest = max(each.args, key=lambda arg: sizes[arg])
            if sizes[longest] > 1 and longest not in steps:
                steps.append(longest)
                sizes[longest] = 1
            sizes[each] = operations + sum(times * sizes[arg] for arg in each.args)
    return steps


def _in_steps(*terms: Term) -> tuple[Term, ...]:
    """Terms with the steps before them."""
    found: dict[Term, None] = {}
    for term in terms:
        found |= dict.fromkeys([*_steps(term, found), term])
    return tuple(found)


def _names(*terms: Term | None) -> set[str]:
    """The arrays that terms read."""
    return set().union(*(names_read(term) for term in terms if term is not None))
