"""TVM's pipeline with register sums of 16 vectors: small buffers on the stack, from where LLVM promotes them.

TVM has buffers of constant size below 1024 bytes on the stack, and allocates others. The sums of 16 vectors of 16
float32 numbers have just 1024.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pa_compiler.cpu import places

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Span
    from tvm.tirx import Buffer, PrimFunc, Stmt, Var
    from tvm.transform import Pass, PassContext

_NAME = "pa_compiler"
_BYTES = 1024


@functools.cache
def pipeline() -> str:
    """The name under which TVM has the pipeline, for tvm.compile(tir_pipeline=...)."""
    import tvm
    from tvm import tirx

    @tirx.transform.prim_func_pass(opt_level=0)
    def keep_on_stack(function: PrimFunc, mod: IRModule, context: PassContext) -> PrimFunc:
        return function.with_body(_keep(function.body))

    def registered() -> tuple[Pass, ...]:
        lower, finalize_host, finalize_device = tirx.get_tir_pipeline("s_tir")
        return lower, lambda: tvm.transform.Sequential([keep_on_stack, finalize_host()]), finalize_device

    tirx.register_tir_pipeline(_NAME, registered)
    return _NAME


def _keep(statement: Stmt) -> Stmt:
    """A statement with buffers of _BYTES marked to stay on the stack, and marks of places become locations."""
    from tvm import tirx

    match statement:
        case tirx.SeqStmt():
            seq = _with_values([_keep(each) for each in statement.seq])
            return tirx.SeqStmt(seq, _common(seq))
        case tirx.For(loop_var=var, min=least, extent=extent, kind=kind, body=body):
            body = _keep(body)
            binding, annotations = statement.thread_binding, statement.annotations
            return tirx.For(var, least, extent, kind, body, binding, annotations, span=_span(body))
        case tirx.AttrStmt(attr_key=places.MARK, value=place, body=body):
            return _located(body, places.span(int(place)))
        case tirx.AttrStmt(node=node, attr_key=key, value=value, body=body):
            body = _keep(body)
            return tirx.AttrStmt(node, key, value, body, _span(body))
        case tirx.IfThenElse(condition=condition, then_case=then, else_case=otherwise):
            then, otherwise = _keep(then), otherwise and _keep(otherwise)
            return tirx.IfThenElse(condition, then, otherwise, _common([then, *([otherwise] if otherwise else [])]))
        case tirx.AllocBuffer(buffer=buffer) if _size(buffer) == _BYTES:
            return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.IntImm("bool", 1)})
        case _:
            return statement


def _size(buffer: Buffer) -> int:
    """Bytes of a buffer of constant size, else 0."""
    from tvm import DataType, tirx

    extents = [int(extent) for extent in buffer.shape if isinstance(extent, tirx.IntImm)]
    return math.prod(extents) * int(DataType(buffer.dtype).itemsize) if len(extents) == len(buffer.shape) else 0


def _located(statement: Stmt, span: Span) -> Stmt:
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
            return tirx.SeqStmt([_located(each, span) for each in statement.seq], span)
        case tirx.For(loop_var=var, min=least, extent=extent, kind=kind, body=body):
            binding, annotations = statement.thread_binding, statement.annotations
            return tirx.For(var, least, extent, kind, _located(body, span), binding, annotations, span=span)
        case tirx.IfThenElse(condition=condition, then_case=then, else_case=otherwise):
            otherwise = otherwise and _located(otherwise, span)
            return tirx.IfThenElse(condition, _located(then, span), otherwise, span)
        case _:
            return statement


def _span(statement: Stmt) -> Span | None:
    """The location of a statement; none of a sequence of several locations, which TVM makes one of."""
    from tvm.ir import SequentialSpan

    return None if isinstance(statement.span, SequentialSpan) else statement.span


def _common(statements: Sequence[Stmt]) -> Span | None:
    """The location of statements that have one, where it is one."""
    spans = {span.line: span for each in statements if (span := _span(each)) is not None}
    return next(iter(spans.values())) if len(spans) == 1 else None


def _with_values(seq: list[Stmt]) -> list[Stmt]:
    """Statements of a sequence, a value that is bound with the location of the first statement that uses it.

    None does where TVM has put the value into those that did: it stood before them, in the same sblock.
    """
    from tvm import tirx
    from tvm.tirx import analysis

    later: list[tuple[Span, set[Var]]] = []  # of the statements that have been passed, the last one first
    for at in reversed(range(len(seq))):
        if isinstance(seq[at], tirx.Bind):
            users = [span for span, used in reversed(later) if seq[at].var in used] or [span for span, _ in later[-1:]]
            seq[at] = _located(seq[at], users[0]) if users else seq[at]
        if (span := _span(seq[at])) is not None:
            later.append((span, set(analysis.undefined_vars(seq[at], []))))
    return seq
