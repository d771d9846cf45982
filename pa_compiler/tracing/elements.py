"""Elements of arrays that functions index, and what is wrong with an index."""

from __future__ import annotations

from pa_compiler.ranges import outside
from pa_compiler.score import BATCH, Term
from pa_compiler.score_text import text
from pa_compiler.tracing import operations as ops
from pa_compiler.tracing.operations import Operand, RefusedTypeError, RefusedValueError


def indices_of(shape: tuple[int | str, ...], index: object, shown: str) -> tuple[object, ...]:
    """What stands in brackets, one for each axis; shown is what an error calls the array."""
    indices = index if isinstance(index, tuple) else (index,)
    if any(each is None or each is Ellipsis or isinstance(each, slice) for each in indices):
        raise RefusedTypeError(f"{shown} with a slice, None or ...: one number for each of {len(shape)} axes")
    if len(indices) != len(shape):
        raise RefusedTypeError(f"{shown} with {len(indices)} of {len(shape)} indices: all in one pair of brackets")
    return indices


def element(
    name: str, dtype: str, shape: tuple[int | str, ...], indices: tuple[Operand, ...], shown: str, num_heads: int
) -> Term:
    """An element of an array, whose indices are not known to be outside of it; numbers below 0 count from the end."""
    terms = []
    for axis, (extent, index) in enumerate(zip(shape, indices, strict=True)):
        place = f"{shown}, axis {axis}"
        if ops.type_of(index) != "int32":
            raise RefusedTypeError(f"{place}, with a {ops.type_of(index)}: expected whole numbers")
        if not isinstance(index, Term) and index < 0:
            if extent == BATCH or index < -int(extent):
                raise RefusedValueError(f"{place}: expected an index inside of {extent}, got {index}")
            index += int(extent)
        term = ops.cast(index, "int32")
        wrong = outside(term, extent, num_heads)
        if wrong is not None:
            raise RefusedValueError(f"{place}: expected 0 to {int(extent) - 1}, got {wrong} from {text(term)}")
        terms.append(term)
    return Term("element", dtype if dtype in ("int32", "bool") else "float32", tuple(terms), name)
