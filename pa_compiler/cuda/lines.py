"""The lines of CUDA C that PTX and SASS come from, as nvcc and nvdisasm say them, taken out of the texts."""

from __future__ import annotations

import re

_CUDA = "kernels.cu"
"""The file whose lines are meant; the others are headers of the toolkit."""

_LOC = re.compile(r"\t\.loc\t(\d+) (\d+) (\d+)(?:, .*inlined_at (\d+) (\d+) (\d+))?")
_FILE = re.compile(r'^\t\.file\t(\d+) "(.*)"', re.MULTILINE)
_NAMES = "\n\t.section\t.debug_str\n"  # of functions that are inlined

_Where = tuple[int, ...]  # a file's number, a line and a column


def outermost(ptx: str) -> str:
    """PTX as nvcc makes it with -lineinfo, but what is inlined comes from the line that it is inlined at.

    ptxas takes neighbours for those of one line that are inlined from the same line at different ones.
    """
    text, _, _ = ptx.partition(_NAMES)
    callers: dict[_Where, _Where] = {}
    lines = []
    for line in text.splitlines():
        if found := _LOC.match(line):
            numbers = tuple(map(int, found.groups("0")))
            where, callers[where] = numbers[:3], numbers[3:]
            seen: set[_Where] = set()
            while callers.get(where, (0,))[0] and where not in seen:
                seen.add(where)
                where = callers[where]
            line = "\t.loc\t{} {} {}".format(*where)
        lines.append(line)
    return "\n".join(lines) + "\n"


def of_ptx(located: str) -> tuple[str, list[int]]:
    """PTX without line numbers, and of each of its lines that of CUDA C: 0 where it has none."""
    own = {number for number, file in _FILE.findall(located) if file.rpartition("/")[2] == _CUDA}
    lines, numbers, number = [], [], 0
    for line in located.splitlines():
        if found := _LOC.match(line):
            number = int(found[2]) if found[1] in own else 0
        elif not line.startswith("\t.file\t"):
            if line.startswith((".visible", ".func", "}")):
                number = 0
            lines.append(line)
            numbers.append(number if re.match(r"\t[a-z@{]|\t// begin inline asm", line) else 0)
    return "\n".join(lines) + "\n", numbers


_LINE = re.compile(rf'\s*//## File "(?:[^"]*/)?{re.escape(_CUDA)}", line (\d+)')
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/")


def of_sass(located: str) -> tuple[str, list[int]]:
    """SASS without line numbers, and of each of its lines that of CUDA C: 0 where it has none."""
    lines, numbers, number = [], [], 0
    for line in located.splitlines():
        if line.lstrip().startswith("//##"):
            found = _LINE.match(line)
            number = int(found[1]) if found else 0
            continue
        if ".section" in line:
            number = 0
        lines.append(line)
        numbers.append(number if _INSTRUCTION.match(line) else 0)
    return "\n".join(lines) + "\n", numbers
