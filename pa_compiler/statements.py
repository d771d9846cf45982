"""Statements of TensorIR taken apart and put together again: what our passes have in common.

They walk through the statements themselves. A Schedule finds its way too, but checks the types of what each of its
calls is given, which took a tenth of a compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.s_tir import SBlock, SBlockRealize
    from tvm.tirx import For, Stmt


def parts(statement: Stmt) -> Sequence[Stmt]:
    """The statements that a statement has in it, in the order of the text."""
    from tvm import s_tir, tirx

    match statement:
        case tirx.SeqStmt(seq=seq):
            return list(seq)
        case tirx.For(body=body) | tirx.AttrStmt(body=body) | tirx.While(body=body):
            return [body]
        case tirx.IfThenElse(then_case=then, else_case=otherwise):
            return [then] if otherwise is None else [then, otherwise]
        case s_tir.SBlockRealize(block=sblock):
            return [sblock]
        case s_tir.SBlock(init=init, body=body):
            return [body] if init is None else [init, body]
        case _:
            return []


def mapped(statement: Stmt, of: Callable[[Stmt], Stmt]) -> Stmt:
    """A statement with others in place of those in it; itself where it has none. It has no location."""
    from tvm import s_tir, tirx

    match statement:
        case tirx.SeqStmt():
            return tirx.SeqStmt([of(each) for each in statement.seq])
        case tirx.For(loop_var=var, min=least, extent=extent, kind=kind, body=body):
            return tirx.For(var, least, extent, kind, of(body), statement.thread_binding, statement.annotations)
        case tirx.AttrStmt(node=node, attr_key=key, value=value, body=body):
            return tirx.AttrStmt(node, key, value, of(body))
        case tirx.IfThenElse(condition=condition, then_case=then, else_case=otherwise):
            return tirx.IfThenElse(condition, of(then), otherwise and of(otherwise))
        case tirx.While(condition=condition, body=body):
            return tirx.While(condition, of(body))
        case s_tir.SBlockRealize(block=sblock):
            return with_sblock(statement, of(sblock))
        case s_tir.SBlock(init=init, body=body):
            init = init and of(init)
            return changed(statement, init=init, body=of(body))
        case _:
            return statement


def with_sblock(realized: SBlockRealize, sblock: SBlock) -> SBlockRealize:
    """A place of an sblock with another sblock."""
    from tvm import s_tir

    return s_tir.SBlockRealize(realized.iter_values, realized.predicate, sblock)


_FIELDS = "iter_vars", "reads", "writes", "name_hint", "body", "init", "alloc_buffers", "match_buffers", "annotations"


def changed(sblock: SBlock, **fields: Any) -> SBlock:
    """An sblock with other fields."""
    from tvm import s_tir

    return s_tir.SBlock(*(fields[name] if name in fields else getattr(sblock, name) for name in _FIELDS))


def with_loops(loops: Sequence[For], body: Stmt) -> Stmt:
    """Loops, from the outermost on, around another body."""
    if not loops:
        return body
    return mapped(loops[0], lambda _: with_loops(loops[1:], body))


def sblocks(statement: Stmt) -> Iterator[SBlock]:
    """All sblocks of a statement in the order of the text, one before those in it."""
    from tvm import s_tir

    if isinstance(statement, s_tir.SBlock):
        yield statement
    for part in parts(statement):
        yield from sblocks(part)
