"""Cycles of inner loops by llvm-mca, where it is on PATH. Nothing depends on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence

from pa_compiler.backend import InnerLoop

PASSES = 20
_SECONDS = 10
_JUMP = re.compile(r"(j\w+|b(\.\w+)?|cbn?z|tbn?z)\s")
"""Of x86 and of AArch64."""


def cycles(loops: Sequence[InnerLoop], mcpu: str, triple: str = "x86_64", passes: int = PASSES) -> list[float] | None:
    """The cycles of a pass through each loop, of some passes; None where llvm-mca is not there or knows not all of it.

    It has models of the cores that LLVM names, not of x86-64-v4 and the like.
    """
    program = shutil.which("llvm-mca")
    if program is None or not loops or loops[0].cycles is None or not mcpu or mcpu.startswith("x86-64"):
        return None
    text = "\n".join(
        line
        for at, loop in enumerate(loops)
        for line in (f"# LLVM-MCA-BEGIN l{at}", *_straight(loop), "# LLVM-MCA-END")
    )
    command = [program, f"-mtriple={triple}", f"-mcpu={mcpu}", f"-iterations={passes}", "-json", "-"]
    try:
        run = subprocess.run(command, input=f"{text}\n", capture_output=True, text=True, timeout=_SECONDS, check=True)
        regions = json.loads(run.stdout)["CodeRegions"]
        found = {region["Name"]: region["SummaryView"]["TotalCycles"] / passes for region in regions}
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None
    return [found[f"l{at}"] for at in range(len(loops))] if len(found) == len(loops) else None


def _straight(loop: InnerLoop) -> list[str]:
    """The instructions without jumps out, whose labels are elsewhere."""
    return [line for line in loop.code if not _JUMP.match(line)]
