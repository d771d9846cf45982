"""Where statements of TensorIR come from, carried through TVM: as marks before its passes, as locations after them.

Each statement that computes is marked with its place before TVM lowers it. The marks are statements of their own, since
TVM's passes lose the locations of those that they rebuild. When all is lowered, marks become locations. No instruction
depends on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pa_compiler.backend import Place
from pa_compiler.statements import mapped

if TYPE_CHECKING:
    from tvm.ir import Expr, Span
    from tvm.tirx import PrimFunc, Stmt, Var

SOURCE = "places"
"""What locations that stand for places name as their file."""

MARK = "pa_compiler.place"
"""The key of the statements that mark."""

FETCH = "fetch of "
"""What the name of a place begins with that is no sblock: a prefetch, which is no part of what is computed around it.
The name of a cache follows."""


def mark_sblocks(function: PrimFunc, name: str, places: list[Place]) -> PrimFunc:
    """A scheduled function whose statements say their sblocks, which are put behind the places, in the text's order."""
    return function.with_body(_marked(function.body, places, Place(name, "", -1)))


def _marked(statement: Stmt, places: list[Place], around: Place) -> Stmt:
    """A statement with marks around what computes; around is the sblock it lies in, with its own number as parent."""
    from tvm import s_tir, tirx

    match statement:
        case s_tir.SBlock(name_hint=name):
            within = around._replace(parent=len(places))
            places.append(around._replace(name=name))
            return mapped(statement, lambda each: _marked(each, places, within))
        case tirx.BufferStore():
            return mark(statement, around.parent)
        case tirx.Evaluate(value=value):
            if cache := _fetched(value):
                places.append(around._replace(name=f"{FETCH}{cache}"))
                return mark(statement, len(places) - 1)
            return mark(statement, around.parent)
        case tirx.Bind(var=var, value=value):
            return tirx.Bind(var, value)  # without the location in the kernel's file, which TVM's parser gives it
        case _:
            return mapped(statement, lambda each: _marked(each, places, around))


def _fetched(value: Expr) -> str:
    """The cache that an expression asks a line of; "" for any other expression."""
    from tvm.ir import Call

    match value:
        case Call(args=[_, Call(args=[load]), *_]) if "llvm.prefetch" in str(value):
            return str(load.source.name)
        case _:
            return ""


def mark(statement: Stmt, place: int) -> Stmt:
    """A statement that says its place."""
    from tvm import tirx

    none = tirx.IntImm("int32", 0)
    return tirx.AttrStmt(none, MARK, tirx.IntImm("int32", place), statement)


def span(place: int) -> Span:
    """The location that stands for a place: lines are counted from 1, and 0 is none."""
    from tvm.ir import SourceName, Span

    return Span(SourceName(SOURCE), place + 1, place + 1, 1, 1)


def located(statement: Stmt, of_other: Callable[[Stmt], Stmt] = lambda other: other) -> Stmt:
    """A lowered statement whose marks are locations, as are those of what is around; of_other makes what has none."""
    from tvm import tirx

    match statement:
        case tirx.SeqStmt():
            seq = _with_values([located(each, of_other) for each in statement.seq])
            return tirx.SeqStmt(seq, _common(seq))
        case tirx.For(loop_var=var, min=least, extent=extent, kind=kind, body=body):
            body = located(body, of_other)
            binding, annotations = statement.thread_binding, statement.annotations
            return tirx.For(var, least, extent, kind, body, binding, annotations, span=location(body))
        case tirx.AttrStmt(attr_key=key, value=place, body=body) if key == MARK:
            return _with_location(body, span(int(place)))
        case tirx.AttrStmt(node=node, attr_key=key, value=value, body=body):
            body = located(body, of_other)
            return tirx.AttrStmt(node, key, value, body, location(body))
        case tirx.IfThenElse(condition=condition, then_case=then, else_case=otherwise):
            then, otherwise = located(then, of_other), otherwise and located(otherwise, of_other)
            return tirx.IfThenElse(condition, then, otherwise, _common([then, *([otherwise] if otherwise else [])]))
        case tirx.While(condition=condition, body=body):
            body = located(body, of_other)
            return tirx.While(condition, body, location(body))
        case _:
            return of_other(statement)


def _with_location(statement: Stmt, span: Span) -> Stmt:
    """What was marked, with its location: a store, or several where TVM has taken it apart."""
    from tvm import tirx

    match statement:
        case tirx.BufferStore(buffer=buffer, value=value, indices=indices):
            return tirx.BufferStore(buffer, value, indices, span)
        case tirx.Evaluate(value=value):
            return tirx.Evaluate(value, span)
        case tirx.Bind(var=var, value=value):
            return tirx.Bind(var, value, span)
        case tirx.SeqStmt():
            return tirx.SeqStmt([_with_location(each, span) for each in statement.seq], span)
        case tirx.For(loop_var=var, min=least, extent=extent, kind=kind, body=body):
            binding, annotations = statement.thread_binding, statement.annotations
            return tirx.For(var, least, extent, kind, _with_location(body, span), binding, annotations, span=span)
        case tirx.IfThenElse(condition=condition, then_case=then, else_case=otherwise):
            otherwise = otherwise and _with_location(otherwise, span)
            return tirx.IfThenElse(condition, _with_location(then, span), otherwise, span)
        case _:
            return statement


def location(statement: Stmt) -> Span | None:
    """The location of a statement; none of a sequence of several locations, which TVM makes one of."""
    from tvm.ir import SequentialSpan

    return None if isinstance(statement.span, SequentialSpan) else statement.span


def _common(statements: Sequence[Stmt]) -> Span | None:
    """The location of statements that have one, where it is one."""
    spans = {span.line: span for each in statements if (span := location(each)) is not None}
    return next(iter(spans.values())) if len(spans) == 1 else None


def _with_values(seq: list[Stmt]) -> list[Stmt]:
    """Statements of a sequence, a value that is bound with the location of the first statement that uses it.

    None does where TVM has put the value into those that did: it stood before them, in the same sblock.
    """
    from tvm import tirx
    from tvm.tirx import analysis

    @functools.cache
    def used(at: int) -> set[Var]:
        return set(analysis.undefined_vars(seq[at], []))

    later: list[int] = []  # those with a location that have been passed, the last one first
    for at in reversed(range(len(seq))):
        if isinstance(seq[at], tirx.Bind) and later:
            users = [user for user in reversed(later) if seq[at].var in used(user)] or later[-1:]
            seq[at] = _with_location(seq[at], seq[users[0]].span)
        if location(seq[at]) is not None:
            later.append(at)
    return seq
