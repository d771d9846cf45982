"""Which sblock each instruction comes from: the places of a scheduled module, carried through LLVM as debug locations.

Each statement that computes is marked with its place before TVM lowers it. The marks are statements of their own, since
TVM's passes lose the locations of those that they rebuild. When all is lowered, they become the locations that TVM's
code generator gives to LLVM (stack.py), and LLVM carries these to the lines of the assembly. No instruction depends on
them, and they are taken out of the texts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pa_compiler.backend import Links, Place

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Expr, Span
    from tvm.tirx import Stmt

MARK = "pa_compiler.place"
"""The key of the statements that mark."""


def mark(mod: IRModule) -> tuple[IRModule, tuple[Place, ...]]:
    """A scheduled module whose statements say their places, and the places."""
    from tvm import IRModule

    places: list[Place] = []
    functions = {
        variable: function.with_body(_marked(function.body, places, Place(variable.name_hint, "", -1)))
        for variable, function in mod.functions.items()
    }
    return IRModule(functions, attrs=mod.attrs), tuple(places)


def _marked(statement: Stmt, places: list[Place], around: Place) -> Stmt:
    """A statement with marks around what computes; its places are put behind the others, in the order of the text.

    around: the sblock that it lies in, with its own number for its parent's.
    """
    from tvm import s_tir, tirx

    match statement:
        case s_tir.SBlockRealize(iter_values=values, predicate=predicate, block=sblock):
            return s_tir.SBlockRealize(values, predicate, _marked(sblock, places, around))
        case s_tir.SBlock(name_hint=name, body=body, init=init):
            within = around._replace(parent=len(places))
            places.append(around._replace(name=name))
            init = init and _marked(init, places, within)
            return s_tir.SBlock(
                statement.iter_vars, statement.reads, statement.writes, name, _marked(body, places, within), init,
                statement.alloc_buffers, statement.match_buffers, statement.annotations,
            )  # fmt: skip
        case tirx.SeqStmt():
            return tirx.SeqStmt([_marked(each, places, around) for each in statement.seq])
        case tirx.For(loop_var=var, min=least, extent=extent, kind=kind, body=body):
            body = _marked(body, places, around)
            return tirx.For(var, least, extent, kind, body, statement.thread_binding, statement.annotations)
        case tirx.AttrStmt(node=node, attr_key=key, value=value, body=body):
            return tirx.AttrStmt(node, key, value, _marked(body, places, around))
        case tirx.IfThenElse(condition=condition, then_case=then, else_case=otherwise):
            then = _marked(then, places, around)
            return tirx.IfThenElse(condition, then, otherwise and _marked(otherwise, places, around))
        case tirx.While(condition=condition, body=body):
            return tirx.While(condition, _marked(body, places, around))
        case tirx.BufferStore():
            return _mark(statement, around.parent)
        case tirx.Evaluate(value=value):
            if cache := _fetched(value):
                places.append(around._replace(name=f"{FETCH}{cache}"))
                return _mark(statement, len(places) - 1)
            return _mark(statement, around.parent)
        case tirx.Bind(var=var, value=value):
            return tirx.Bind(var, value)  # without the location in the kernel's file, which TVM's parser gives it
        case _:
            return statement


FETCH = "fetch of "
"""What the name of a place begins with that is no sblock: a prefetch, which is no part of what is computed around it.
The name of a cache follows."""


def _fetched(value: Expr) -> str:
    """The cache that an expression asks a line of; "" for any other expression."""
    from tvm.ir import Call

    match value:
        case Call(args=[_, Call(args=[load]), *_]) if "llvm.prefetch" in str(value):
            return str(load.source.name)
        case _:
            return ""


def _mark(statement: Stmt, place: int) -> Stmt:
    from tvm import tirx

    none = tirx.IntImm("int32", 0)
    return tirx.AttrStmt(none, MARK, tirx.IntImm("int32", place), statement)


def span(place: int) -> Span:
    """The location that stands for a place: lines are counted from 1, and 0 is none."""
    from tvm.ir import SourceName, Span

    return Span(SourceName("places"), place + 1, place + 1, 1, 1)


_LOCATION = re.compile(r"^!(\d+) = !?(?:distinct )?!DILocation\(line: (\d+)", re.MULTILINE)
_RECORDS = re.compile(r"\n +#dbg_\w+\(.*\)")


def with_locations(llvm: str) -> str:
    """LLVM's text as TVM emits it, so that of the debug information the assembly has the locations alone."""
    return _RECORDS.sub("", llvm).replace("emissionKind: FullDebug", "emissionKind: DebugDirectivesOnly")


_FUNCTION = re.compile(r"^define [^@\n]*@(\w+)\(.*?\) (?:[^#\n]* )?#(\d+)", re.MULTILINE)
_LABEL = re.compile(r"([A-Za-z_]\w*):")
_ATTRIBUTES = re.compile(r"^attributes #(\d+) = \{(.*)\}", re.MULTILINE)


def apart(located: str, llvm: str) -> tuple[str, list[int]]:
    """Assembly with locations as it is without them, and of each of its lines the place: -1 where it has none.

    Args:
        located: The assembly.
        llvm: The text that it is of. Functions that may throw are unwound with or without locations.
    """
    attributes = dict(_ATTRIBUTES.findall(llvm))
    thrown = {name for name, number in _FUNCTION.findall(llvm) if "nounwind" not in attributes[number].split()}
    lines, places, place, function = [], [], -1, ""
    for line in located.splitlines():
        of = -1
        if line.startswith("\t."):
            if line.startswith("\t.loc\t"):
                place = int(line.split()[2]) - 1
                continue
            if line.startswith("\t.cfi_") and (function not in thrown or line.startswith("\t.cfi_sections")):
                continue
            if line.startswith("\t.file\t") and line[7].isdigit():
                continue
        elif line.startswith("\t") and not line.startswith("\t#"):
            of = place
        elif line.startswith((".Ltmp", ".Lfunc_begin")):
            continue
        elif name := _LABEL.match(line):
            place, function = -1, name[1]
        lines.append(line)
        places.append(of)
    return "\n".join(lines) + "\n", places


def of_llvm(emitted: str, shown: str) -> list[int]:
    """Of each line of LLVM's text as it is shown, the place.

    Args:
        emitted: The same text with locations, as TVM emits it.
        shown: Without them, read and printed by LLVM once more.

    Raises:
        RuntimeError: the two have not the same instructions, line for line.
    """
    lines = {number: int(line) - 1 for number, line in _LOCATION.findall(emitted)}
    located = (_place(line, lines) for line in emitted.splitlines() if line.startswith("  ") and line[4:8] != "#dbg")
    places = [next(located, None) if line.startswith("  ") else -1 for line in shown.splitlines()]
    if None in places or next(located, None) is not None:
        raise RuntimeError("llvm: expected the text that TVM has emitted, got one with other lines")
    return [-1 if place is None else place for place in places]


def _place(line: str, lines: dict[str, int]) -> int:
    _, found, number = line.rpartition("!dbg !")
    return lines.get(number.partition(",")[0], -1) if found else -1


def links(places: Sequence[Place], llvm: Iterable[int], asm: Iterable[int]) -> Links:
    """What was found, with equal neighbours in one entry."""
    return Links(tuple(places), {"llvm": _runs(llvm), "asm": _runs(asm)})


def _runs(places: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return tuple((place, len(list(run))) for place, run in itertools.groupby(places))
