"""What assembly text says about its inner loops: of x86 in the syntax of AT&T, and of AArch64."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Loop(NamedTuple):
    """A loop, without what loops inside of it have.

    Attributes:
        function: That it is in.
        lines: Of the text, counted from 1, at which its instructions are.
        code: These instructions.
        innermost: Whether there is no loop inside of it but one of fetches.
    """

    function: str
    lines: tuple[int, ...]
    code: tuple[str, ...]
    innermost: bool

    @property
    def line(self) -> int:
        """The line at which it begins."""
        return self.lines[0]


class Counts(NamedTuple):
    """Instructions of one pass through a piece of code, by what they do. One that loads and adds counts as both.

    Attributes:
        instructions: All of them.
        fmas: Fused multiply-adds, of vectors and of scalars.
        dots: Dot products of pairs of bfloat16, vdpbf16ps and bfdot, or of integers of 16 bits, vpdpwssd and vpmaddwd,
            of two multiply-adds each; or of four bytes, vpdpbusd, for which vpmaddwd stands too, behind vpmaddubsw; and
            products of tiles of bfloat16, tdpbf16ps.
        arithmetic: Other float32 additions, products, divisions, minima and maxima.
        loads: Vector registers and operands that are read from memory as they lie there, from the stack too.
        broadcasts: Instructions that do nothing but copy one element to all lanes.
        embedded: Broadcasts that are an operand of another instruction: of an element in memory, or of a register.
        conversions: From float16 or bfloat16 to float32; of bfloat16, shifts of 16 bits, masks of the upper half,
            and permutations of 16-bit elements, which pair those of two tokens. Of codes those to 16 bits.
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


class Syntax(NamedTuple):
    """How instructions are written.

    What matches those that Counts has, a jump's label, numbers of registers, and what does more than fetch.
    """

    jump: re.Pattern[str]
    fma: re.Pattern[str]
    dot: re.Pattern[str]
    arithmetic: re.Pattern[str]
    load: re.Pattern[str]
    broadcast: re.Pattern[str]
    embedded: re.Pattern[str]
    conversion: re.Pattern[str]
    prefetch: re.Pattern[str]
    stack_store: re.Pattern[str]
    register: re.Pattern[str]
    does_more: re.Pattern[str]


X86 = Syntax(
    jump=re.compile(r"j\w+\s+(\.LBB\w+)"),
    fma=re.compile(r"vfn?m(add|sub)\d+[ps]s\s"),
    dot=re.compile(r"(\{vex\}\s+)?v?(t?dpbf16ps|pmaddwd|pdpwssd|pdpbusd)\s"),
    arithmetic=re.compile(r"v?(add|sub|mul|div|min|max)[ps]s\s"),
    load=re.compile(r"(?!kmov).*\).*,\s*%([xyz]mm|k)\d+[^,()]*$"),
    broadcast=re.compile(r"v?p?broadcast\w+\s"),
    embedded=re.compile(r".*\{1to\d+\}"),
    conversion=re.compile(
        r"v?(cvtph2ps\s|pmovsxbw\s|pslld\s+\$16,|pblendw\s+\$170,|p?and(ps|d|q)?\s|permt2w\s|permi2w\s)"
    ),
    prefetch=re.compile("prefetch"),
    stack_store=re.compile(r"(?!cmp|test|bt|prefetch|call|jmp|push|i?mul|i?div)\w+\s+.*\(%rsp[^)]*\)(\s*\{%k\d\})?$"),
    register=re.compile(r"%[xyz]mm(\d+)"),
    does_more=re.compile(r"%[xyzt]mm|^call|^mov\w*\s.*\)$"),
)
AARCH64 = Syntax(
    jump=re.compile(r"(?:b(?:\.\w+)?|cbn?z|tbn?z)\s.*?(\.LBB\w+)"),
    fma=re.compile(r"(fml[as]|fn?m(add|sub))\s"),
    dot=re.compile(r"bf(dot|mmla)\s"),
    arithmetic=re.compile(r"f(add|sub|n?mul|div|min|max)(nm)?[pv]?\s"),
    load=re.compile(r"ldu?[rp]\s+[qds]\d+,\s*([qds]\d+,)?|ld1\s"),
    broadcast=re.compile(r"(ld1r|dup)\s"),
    embedded=re.compile(r"(fml[as]|f?mul|bfdot)\s.*\.\w+\[\d+\]$"),
    conversion=re.compile(r"(fcvtl2?|fcvt|and|bic|zip[12]|uzp[12]|trn[12])\s+[vs]\d|u?shll?2?\s+v\d.*#16$"),
    prefetch=re.compile("prfm"),
    stack_store=re.compile(r"stu?[rp]\s.*\[sp\b"),
    register=re.compile(r"\b[vqsd](\d+)\b"),
    does_more=re.compile(r"\b[vqsd]\d+\b|^bl\s|^st"),
)


def syntax_of(code: Iterable[str]) -> Syntax:
    """The syntax of instructions or of a text's lines: AT&T's has a sign before each register."""
    return X86 if any("%" in line for line in code if not line.lstrip().startswith((".", "//"))) else AARCH64


def inner_loops(asm: str) -> list[Loop]:
    """The innermost loops, in order: code between a label and a jump back to it, with no such code inside.

    A loop of fetches does not count, which stands between the products of a loop around it: it is a part of that one,
    as if it ran once.
    """
    return [loop for loop in loops(asm) if loop.innermost]


def loops(asm: str) -> list[Loop]:
    """The innermost loops, and those around them that have float32 arithmetic of their own, in the order of their ends.

    An instruction is of one of them at most: what is inside of two is of the inner one.
    """
    code: list[tuple[str, int, str]] = []  # function, line, instruction
    labels: dict[str, int] = {}
    function = ""
    for number, line in enumerate(map(str.strip, asm.splitlines()), start=1):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif name := re.match(r"([A-Za-z_]\w*):", line):
            function = name[1]
        elif line and not line.startswith((".", "#", "//")) and not line.endswith(":"):
            code.append((function, number, line))
    syntax = syntax_of(line for _, _, line in code)
    jumps = [
        (labels.get(jump[1], math.inf), end) for end, each in enumerate(code) if (jump := syntax.jump.match(each[2]))
    ]
    spans = [(int(begin), end) for begin, end in jumps if begin <= end]
    innermost = _without_others(spans)
    fetches = {(begin, end) for begin, end in innermost if _fetches([line for _, _, line in code[begin : end + 1]])}
    around = _without_others([span for span in spans if span not in fetches])
    alone = [span for span in fetches if not any(_within(span, other) for other in around)]
    found, taken = [], set()
    for begin, end in sorted(set(spans) - fetches | set(alone), key=lambda span: (span[1] - span[0], span)):
        own = [at for at in range(begin, end + 1) if at not in taken]
        if not own:
            continue
        taken.update(own)
        functions, lines, instructions = zip(*(code[at] for at in own), strict=True)
        loop = Loop(functions[0], lines, instructions, (begin, end) in {*around, *alone})
        if loop.innermost or _computes(instructions):
            found.append((end, loop))
    return [loop for _, loop in sorted(found, key=lambda each: each[0])]


def _computes(code: Sequence[str]) -> bool:
    syntax = syntax_of(code)
    return any(pattern.match(line) for line in code for pattern in (syntax.fma, syntax.dot, syntax.arithmetic))


def _within(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= loop[0] and loop[1] <= other[1] and loop != other


def _without_others(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The loops that no other is within."""
    return [loop for loop in loops if not any(_within(other, loop) for other in loops)]


def _fetches(code: Sequence[str]) -> bool:
    """Whether code does nothing but fetch into a cache: no vector or tile register, and nothing written."""
    syntax = syntax_of(code)
    return any(map(syntax.prefetch.match, code)) and not any(map(syntax.does_more.search, code))


def count(code: Sequence[str]) -> Counts:
    """Count what the instructions do."""
    syntax = syntax_of(code)

    def matching(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(line)) for line in code)

    def loads(line: str) -> int:
        found = syntax.load.match(line)
        if not found or syntax.broadcast.match(line) or (syntax is X86 and syntax.embedded.match(line)):
            return 0
        return 2 if line.startswith("ldp") else 1

    return Counts(
        instructions=len(code),
        fmas=matching(syntax.fma),
        dots=matching(syntax.dot),
        arithmetic=matching(syntax.arithmetic),
        loads=sum(map(loads, code)),
        broadcasts=matching(syntax.broadcast),
        embedded=matching(syntax.embedded),
        conversions=matching(syntax.conversion),
        prefetches=matching(syntax.prefetch),
        stack_stores=matching(syntax.stack_store),
    )
