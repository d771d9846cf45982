"""prim_func and inline: TVM's T.prim_func and T.inline, for TVMScript that is read faster.

TVM's parser takes an expression apart and has Python compile and run each of its nodes, a few thousand for one spec.
Here Python runs an expression as a whole, compiled once in a process; what statements mean stays TVM's. Nor is a
function's text looked for: `inspect` asks for the real path of every module there is, and, to find the parser that an
inline is used in, describes every frame of the stack with its source lines.

In expressions, `and`, `or`, `not` and conditional expressions are Python's, for what is known when the script is read;
of TensorIR there are T.And, T.Or, T.Not and T.if_then_else.
"""

import ast
import functools
import linecache
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

from tvm import IRModule, s_tir, tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.parser.core import doc
from tvm.script.parser.core.diagnostics import Source
from tvm.script.parser.core.evaluator import _eval_op
from tvm.script.parser.core.parser import Parser
from tvm.script.parser.core.utils import inspect_function_capture
from tvm.tirx import PrimFunc
from tvm.tirx.script.parser.entry import TIRInline


def prim_func(*, s_tir: bool) -> Callable[[Callable[..., None]], PrimFunc]:
    """As T.prim_func: the decorated function, TVMScript, becomes a PrimFunc.

    Args:
        s_tir: As there, and it is True here; what reads it is TVM's parser, in the text of the decorator.

    Raises:
        tvm.error.DiagnosticError: a mistake in the script; it names the statement.
    """
    return _parse


def _parse(function: Callable[..., None]) -> PrimFunc:
    parser = _Parser(_source(function), {function.__name__: function.__annotations__})
    with IRBuilder() as builder:
        parser.parse(inspect_function_capture(function))
    parsed = builder.get()
    s_tir.analysis.verify_well_formed(parsed)
    return parsed


_parse.dispatch_token = "tirx"  # type: ignore[attr-defined]  # what TVM's parser knows the decorator by


def inline(body: Callable[..., None]) -> Callable[..., None]:
    """As T.inline: body, TVMScript, becomes part of each PrimFunc whose script calls it.

    Raises:
        RuntimeError: by the call, outside of a PrimFunc's script.
    """

    @functools.cache
    def expansion() -> _Inline:  # when it is used: a spec uses some of all that there are
        return _Inline(_source(body), inspect_function_capture(body), body)

    def expand(*args: object, **kwargs: object) -> None:
        expansion()(*args, **kwargs)

    return expand


class _Inline(TIRInline):
    def _find_parser_def(self) -> Parser:
        """The innermost parser on the stack, which names itself in the globals of the code that it evaluates."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            parser = frame.f_globals.get(self.parser_object_name)
            if parser is not None:
                return parser
            frame = frame.f_back
        raise RuntimeError(f"{self.func.__qualname__}: used outside of a T.prim_func")


class _Source(Source):
    """The text and the tree of one function."""

    def __init__(self, file: str, function: ast.FunctionDef) -> None:
        self.source_name, self.start_line, self.start_column = file, 1, 0  # the tree's places are those in the file
        self.source = self.full_source = "".join(linecache.getlines(file))
        self._expressions: dict[doc.AST, ast.expr] = {}
        self._comparing: set[doc.AST] = set()  # the expressions that have a comparison in them
        self._comparisons = 0
        self._code: dict[doc.AST, tuple[CodeType, frozenset[str]]] = {}
        self._tree = doc.Module([self._translate(function)])

    def as_ast(self) -> doc.Module:
        """TVM's own kind of tree."""
        return self._tree

    def _translate(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self._translate(item) for item in node]
        if not isinstance(node, ast.AST):
            return node
        before = self._comparisons
        self._comparisons += isinstance(node, ast.Compare)
        kind = getattr(doc, type(node).__name__)
        translated = kind(**{name: self._translate(getattr(node, name, None)) for name in kind._FIELDS})
        if isinstance(node, ast.expr):
            self._expressions[translated] = node
            if self._comparisons > before:
                self._comparing.add(translated)
        return translated

    def code(self, node: doc.expr) -> tuple[CodeType, frozenset[str]] | None:
        """An expression of the tree, to be evaluated, and the names in it. None for one that is not of the tree."""
        if node not in self._code and node in self._expressions:
            expression = self._expressions[node]
            if hasattr(expression, "ctx"):  # x of x[i] += 1 is read as well
                expression.ctx = ast.Load()
            if node in self._comparing:
                expression = ast.fix_missing_locations(_Comparisons().visit(expression))
            code = compile(ast.Expression(expression), self.source_name, "eval")
            self._code[node] = code, frozenset(_names(code))
        return self._code.get(node)


@functools.cache
def _functions(file: str) -> dict[int, ast.FunctionDef]:
    """The functions of a file by their first lines, which are those of decorators."""
    functions, pending = {}, ast.parse("".join(linecache.getlines(file)), file).body
    while pending:
        statement = pending.pop()
        if isinstance(statement, ast.FunctionDef):
            decorators = [decorator.lineno for decorator in statement.decorator_list]
            functions[min([statement.lineno, *decorators])] = statement
        pending += getattr(statement, "body", [])
    return functions


@functools.cache
def _source_at(file: str, line: int) -> _Source:
    return _Source(file, _functions(file)[line])


def _source(function: Callable[..., None]) -> _Source:
    code = function.__code__
    linecache.lazycache(code.co_filename, function.__globals__)  # for a package in a zip, whose loader has the text
    return _source_at(code.co_filename, code.co_firstlineno)


def _names(code: CodeType) -> set[str]:
    """The global names of a piece of code and of the functions in it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


_COMPARE = "__compare__"


def _compare(kind: str, left: Any, right: Any) -> Any:
    return _eval_op(getattr(doc, kind)(), [left, right])


class _Comparisons(ast.NodeTransformer):
    """Comparisons as calls of _compare: what TVM's parser makes of a == b for expressions is not what Python does."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) > 1:
            return node
        operands = [ast.Constant(type(node.ops[0]).__name__), node.left, node.comparators[0]]
        return ast.copy_location(ast.Call(ast.Name(_COMPARE, ast.Load()), operands, []), node)


class _Parser(Parser):
    """TVM's parser, but for how it evaluates expressions."""

    def eval_expr(self, node: doc.expr, extra_vars: dict[str, Any] | None = None) -> Any:
        """The value of an expression."""
        table = self.var_table.name2value
        if isinstance(node, doc.Name):
            if not table.get(node.id):  # so does TVM ask whether an assignment's target is new
                raise NameError(f"name {node.id!r} is not defined")
            return table[node.id][-1]
        found = self.diag.source.code(node) if isinstance(self.diag.source, _Source) else None
        if found is None:
            return super().eval_expr(node, extra_vars)
        code, names = found
        scope = {name: table[name][-1] for name in names if table.get(name)}
        scope |= {_Inline.parser_object_name: self, _COMPARE: _compare} | (extra_vars or {})
        return self.annotate_current_source_span(eval(code, scope))

    def eval_assign(
        self,
        target: doc.expr,
        source: Any,
        bind_value: Callable[[Parser, doc.expr, str, Any], Any],
        allow_shadowing: bool = False,
    ) -> dict[str, Any]:
        """Bind the names of a target."""
        if not isinstance(target, doc.Name):
            return super().eval_assign(target, source, bind_value, allow_shadowing)
        self.var_table.add(target.id, bind_value(self, target, target.id, source), allow_shadowing)
        return {target.id: source}


def functions_of(span: Any) -> tuple[str, ...]:
    """The functions that a statement of a script lies in: the PrimFunc's, then inlines from the outermost on.

    span is its location as TVM's parser has made it, or None.
    """
    names: list[str] = []
    for each in getattr(span, "spans", [span] if span else []):
        first = max((line for line in _outermost(each.source_name.name) if line <= each.line), default=0)
        name = _outermost(each.source_name.name).get(first, "")
        if name and names[-1:] != [name]:
            names.append(name)
    return tuple(names)


@functools.cache
def _outermost(file: str) -> dict[int, str]:
    """The functions and classes of a file that are in no other, by their first lines."""
    body = ast.parse("".join(linecache.getlines(file)), file).body
    return {each.lineno: each.name for each in body if isinstance(each, (ast.FunctionDef, ast.ClassDef))}


def opaque(value: Expr) -> Expr:
    """The same int32, of which TVM's passes know nothing; no instruction.

    They put the value of a variable into whatever it is used for, and most of their time goes into the bounds of what
    is nested several times.
    """
    return tirx.call_intrin("int32", "tirx.reinterpret", value)


def text(mod: IRModule, remarks: Mapping[tirx.Stmt, str] | None = None) -> str:
    """TVMScript, in the same words under every Python: from 3.12 on TVM would declare type variables another way.

    A statement with a remark has it as a comment, behind it or in the line above.
    """
    return str(mod.script(obj_to_annotate=dict(remarks or {}), extra_config={"relax.use_pep695": False})) + "\n"
