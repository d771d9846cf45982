"""Which sblock each instruction comes from: the places of a scheduled module, carried through LLVM as debug locations.

locations.py carries them through TVM's passes (passes.py). TVM's code generator gives them to LLVM, and LLVM carries
them to the lines of the assembly. No instruction depends on them, and they are taken out of the texts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pa_compiler import locations
from pa_compiler.backend import Place

if TYPE_CHECKING:
    from tvm import IRModule


def mark(mod: IRModule) -> tuple[IRModule, tuple[Place, ...]]:
    """A scheduled module whose statements say their places, and the places."""
    from tvm import IRModule

    places: list[Place] = []
    functions = {
        variable: locations.mark_sblocks(function, variable.name_hint, places)
        for variable, function in mod.functions.items()
    }
    return IRModule(functions, attrs=mod.attrs), tuple(places)


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
