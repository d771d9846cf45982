"""What x86 assembly text, in the syntax of AT&T, says about its inner loops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Loop(NamedTuple):
    """An innermost loop: its function, the line of the text that it begins at (from 1), and its instructions."""

    function: str
    line: int
    code: tuple[str, ...]


class Counts(NamedTuple):
    """Instructions of one pass through a piece of code, by what they do. One that loads and adds counts as both.

    Attributes:
        instructions: All of them.
        fmas: Fused multiply-adds, of vectors and of scalars.
        dots: Dot products of pairs of bfloat16, vdpbf16ps: of two fused multiply-adds each; and products of tiles of
            them, tdpbf16ps.
        arithmetic: Other float32 additions, products, divisions, minima and maxima.
        loads: Vector registers and operands that are read from memory as they lie there, from the stack too.
        broadcasts: Instructions that do nothing but copy one element to all lanes.
        embedded: Broadcasts that are an operand of another instruction.
        conversions: From float16 or bfloat16 to float32; of bfloat16, shifts of 16 bits, masks of the upper half,
            and permutations of 16-bit elements, which pair those of two tokens.
        prefetches: Fetches into a cache.
        stack_stores: Instructions that write to the stack.
    """

    instructions: int
    fmas: int
    dots: int
    arithmetic: int
    loads: int
    broadcasts: int
    embedded: int
    conversions: int
    prefetches: int
    stack_stores: int


_FMA = re.compile(r"vfn?m(add|sub)\d+[ps]s\s")
_DOT = re.compile(r"v?t?dpbf16ps\s")
_ARITHMETIC = re.compile(r"v?(add|sub|mul|div|min|max)[ps]s\s")
_LOAD = re.compile(r"(?!kmov).*\).*,\s*%([xyz]mm|k)\d+[^,()]*$")
_BROADCAST = re.compile(r"v?p?broadcast\w+\s")
_EMBEDDED = re.compile(r".*\{1to\d+\}")
_CONVERSION = re.compile(r"v?(cvtph2ps\s|pslld\s+\$16,|pblendw\s+\$170,|p?and(ps|d|q)?\s|permt2w\s|permi2w\s)")
_PREFETCH = re.compile("prefetch")
_DOES_MORE = re.compile(r"%[xyzt]mm|^call|^mov\w*\s.*\)$")
_STACK_STORE = re.compile(r"(?!cmp|test|bt|prefetch|call|jmp|push|i?mul|i?div)\w+\s+.*\(%rsp[^)]*\)(\s*\{%k\d\})?$")


def inner_loops(asm: str) -> list[Loop]:
    """The innermost loops, in order: code between a label and a jump back to it, with no such code inside.

    A loop of fetches does not count, which stands between the products of a loop around it: it is a part of that one,
    as if it ran once.
    """
    code: list[tuple[str, str]] = []  # function, instruction
    lines: list[int] = []
    labels: dict[str, int] = {}
    function = ""
    for number, line in enumerate(map(str.strip, asm.splitlines()), start=1):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif name := re.match(r"([A-Za-z_]\w*):", line):
            function = name[1]
        elif line and not line.startswith((".", "#")) and not line.endswith(":"):
            code.append((function, line))
            lines.append(number)
    jumps = []
    for end, (_, line) in enumerate(code):
        if jump := re.match(r"j\w+\s+(\.LBB\w+)", line):
            jumps.append((labels.get(jump[1], math.inf), end))
    loops = [(int(begin), end) for begin, end in jumps if begin <= end]
    innermost = _without_others(loops)
    fetches = {(begin, end) for begin, end in innermost if _fetches([line for _, line in code[begin : end + 1]])}
    around = _without_others([loop for loop in loops if loop not in fetches])
    alone = [loop for loop in fetches if not any(_within(loop, other) for other in around)]
    return [
        Loop(code[begin][0], lines[begin], tuple(line for _, line in code[begin : end + 1]))
        for begin, end in loops
        if (begin, end) in {*around, *alone}
    ]


def _within(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= loop[0] and loop[1] <= other[1] and loop != other


def _without_others(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The loops that no other is within."""
    return [loop for loop in loops if not any(_within(other, loop) for other in loops)]


def _fetches(code: Sequence[str]) -> bool:
    """Whether code does nothing but fetch into a cache: no vector or tile register, and nothing written."""
    return any(_PREFETCH.match(line) for line in code) and not any(_DOES_MORE.search(line) for line in code)


def count(code: Sequence[str]) -> Counts:
    """Count what the instructions do."""

    def matching(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(line)) for line in code)

    return Counts(
        instructions=len(code),
        fmas=matching(_FMA),
        dots=matching(_DOT),
        arithmetic=matching(_ARITHMETIC),
        loads=sum(bool(_LOAD.match(line)) and not (_BROADCAST.match(line) or _EMBEDDED.match(line)) for line in code),
        broadcasts=matching(_BROADCAST),
        embedded=matching(_EMBEDDED),
        conversions=matching(_CONVERSION),
        prefetches=matching(_PREFETCH),
        stack_stores=matching(_STACK_STORE),
    )
