"""Which stage of the algorithm the machine code of a module is linked to, and which links cannot be right."""

from __future__ import annotations

import re
from collections import Counter

from pa_compiler.backend import links
from pa_compiler.cpu.assembly import loops
from pa_compiler.report.units import Units

_OF_X86 = r"v?(fn?m(add|sub)\w*|add|sub|mul|div|min|max)[ps]s\s|v?t?dpbf16ps\s"
_OF_AARCH64 = r"f(ml[as]|n?m(add|sub)|add|sub|mul|div|min|max)(nm)?[pv]?\s|bf(dot|mmla)\s"
ARITHMETIC = re.compile(f"{_OF_X86}|{_OF_AARCH64}")
PRODUCTS = re.compile(r"v?(fn?madd\w+|t?dpbf16)ps\s|f(mla|madd)\s|bf(dot|mmla)\s")
FETCH = re.compile(r"\t(prefetch|prfm)")
_STAGES = {
    r"(prefetch|prfm)": {"fetches"},
    r"v?t?dpbf16ps": {"qk_matmul", "pv_matmul", "softmax"},  # the last sums pairs of probabilities
    r"(v?div[ps]s|fdiv)": {"normalize", "scores"},
    r"v?maxps": {"scores", "softmax"},
}
"""Instructions that few stages have, and which those are."""


def units(module):
    """The units of a module, and those that each line of its texts is of."""
    return Units(dict(module.sources), links(module._links))


def stages_of_lines(module):
    """(instruction, its stage) of the assembly; the stage is "" where none is known."""
    found = units(module)
    lines = module.sources["asm"].splitlines()
    of_lines = found.of_lines["asm"]
    assert len(lines) == len(of_lines)
    return [(line, found.all[unit].stage if unit >= 0 else "") for line, unit in zip(lines, of_lines, strict=True)]


def coverage(module):
    """How many arithmetic instructions loops have, and how many of those are linked to a stage."""
    stages = stages_of_lines(module)
    found = Counter()
    for loop in loops(module.sources["asm"]):
        for line, instruction in zip(loop.lines, loop.code, strict=True):
            text, stage = stages[line - 1]
            assert text.strip() == instruction
            if ARITHMETIC.match(instruction):
                found["all"] += 1
                found["linked"] += stage != ""
    return found["all"], found["linked"]


def wrong(stages):
    """The instructions whose stage has none of their kind."""
    return [
        (line.strip(), stage)
        for line, stage in stages
        for pattern, of in _STAGES.items()
        if stage and re.match(rf"\t{pattern}\s|\t{pattern}t\d", line) and stage not in of
    ]
