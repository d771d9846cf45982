"""Which function of a kernel's script each line of a GPU's texts comes from, and each instruction.

TVM's parser gives each statement of a kernel with threads the lines that it stands in: in the PrimFunc, and in each
function that is inlined there. These functions are the places. Kernels that are scheduled have sblocks for places, as
on a CPU. locations.py carries places through TVM's passes; before TVM prints CUDA C, each statement gets a call before
it that says its place, which is taken out of the text. From there on they are nvcc's line numbers (lines.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pa_compiler import locations
from pa_compiler.backend import Place
from pa_compiler.statements import mapped

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.tirx import Stmt

_SAYS = "pa_place"
_CALL = re.compile(rf"^\s*{_SAYS}\((-?\d+)\);$")
_REMARK = re.compile(rf"\s*# {_SAYS} (-?\d+)$")

PlaceOf = Callable[[Any], int]
"""The place of a statement, by its location."""


class Places:
    """The places of a module's functions, by their numbers in `all`, where a place stands behind the one around it."""

    def __init__(self) -> None:
        self.all: list[Place] = []
        self._numbers: dict[tuple[str, ...], int] = {}

    def mark(self, mod: IRModule) -> IRModule:
        """A module whose statements say their places: sblocks in functions that are scheduled, in others functions."""
        from tvm import IRModule

        functions = {}
        for variable, function in mod.functions.items():
            if function.attrs.get("s_tir"):
                functions[variable] = locations.mark_sblocks(function, variable.name_hint, self.all)
            else:
                functions[variable] = function.with_body(_marked(function.body, self._of(variable.name_hint)))
        return IRModule(functions, attrs=mod.attrs)

    def text(self, mod: IRModule) -> tuple[str, list[int]]:
        """The text of a module, and of each of its lines the place: -1 in functions that are scheduled.

        The sblocks of those are in their text.
        """
        from pa_compiler import tvmscript

        remarks: dict[Stmt, str] = {}
        for variable, function in mod.functions.items():
            if not function.attrs.get("s_tir"):
                _remark(function.body, self._of(variable.name_hint), remarks)
        lines, places, above = [], [], -1
        for line in tvmscript.text(mod, remarks).splitlines():
            said = _REMARK.search(line)
            if said and not line[: said.start()].strip():
                above = int(said[1])
                continue
            lines.append(line[: said.start()] if said else line)
            places.append(int(said[1]) if said else above)
            above = -1
        text = tvmscript.text(mod)
        if lines != text.splitlines():
            raise RuntimeError(
                "tensorir: expected remarks behind or above the lines of a module's text, got other lines"
            )
        return text, places

    def _of(self, function: str) -> PlaceOf:
        """The place of a statement of a function with threads, which is put behind the others."""
        from pa_compiler import tvmscript

        def of(span: Any) -> int:
            path: tuple[str, ...] = (function,)
            number = -1
            for name in tvmscript.functions_of(span):
                path = (*path, name)
                if path not in self._numbers:
                    self._numbers[path] = len(self.all)
                    self.all.append(Place(function, name, number))
                number = self._numbers[path]
            return number

        return of


def _marked(statement: Stmt, place: PlaceOf) -> Stmt:
    from tvm import tirx

    if isinstance(statement, (tirx.BufferStore, tirx.Evaluate)):
        return locations.mark(statement, place(statement.span))
    return mapped(statement, lambda each: _marked(each, place))


def _remark(statement: Stmt, place: PlaceOf, remarks: dict[Stmt, str]) -> Stmt:
    """Put a remark beside each statement that has a line of its own; what allocates may share one with a store."""
    from tvm import tirx

    if not isinstance(statement, (tirx.SeqStmt, tirx.AttrStmt, tirx.AllocBuffer, tirx.DeclBuffer)):
        remarks[statement] = f"{_SAYS} {place(statement.span)}"
    mapped(statement, lambda each: _remark(each, place, remarks))
    return statement


def with_calls(mod: IRModule) -> IRModule:
    """A lowered module whose marks are calls, which say the place of what follows; -1 where it is not one."""
    from tvm import IRModule, tirx

    def call(statement: Stmt) -> Stmt:
        span = locations.location(statement)
        place = -1 if span is None or span.source_name.name != locations.SOURCE else span.line - 1
        return tirx.Evaluate(tirx.call_extern("int32", _SAYS, place))

    def visit(statement: Stmt) -> Stmt:
        inner = mapped(statement, visit)
        if isinstance(statement, (tirx.SeqStmt, tirx.AttrStmt)):
            return inner
        return tirx.SeqStmt([call(statement), inner])

    functions = {
        variable: function.with_body(visit(locations.located(function.body)))
        for variable, function in mod.functions.items()
    }
    return IRModule(functions, attrs=mod.attrs)


def apart(said: str) -> tuple[str, list[int]]:
    """CUDA C as it is without the calls, and of each of its lines the place: -1 where it has none."""
    lines, places, place = [], [], -1
    for line in said.splitlines():
        if call := _CALL.match(line):
            place = int(call[1])
            continue
        if line == "}":
            place = -1
        lines.append(line)
        places.append(-1 if line.strip() == "}" else place)
    return "\n".join(lines) + "\n", places
