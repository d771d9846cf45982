"""What a call executes: a library whose kernels write down their blocks of instructions and the memory they access.

Before each block of a kernel's assembly stand instructions that count it and put its number into a ring, and before
each access to memory some that put the address there. They change neither flags nor registers, so results have the
same bits. A call must be on one thread.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tvm_ffi

from pa_compiler import host, native
from pa_compiler.interface import CPU_ENTRY_POINTS

_BITS = 19
_RING = 1 << _BITS
_NAME = "trace"  # of the data that leaves the library, among the entry points
_SYMBOL = f"__tvm_ffi_{_NAME}"

_LABEL = re.compile(r"[.\w]+:")
_ADDRESS = re.compile(r"(?<![\w*])(-?[\w.]*\((?:%\w+)?(?:,\s*%\w+)?(?:,\s*\d)?\))")
_END = '\t.section\t".note.GNU-stack","",@progbits'
"""The last line of a file of LLVM's; labels are those of a file."""
_NO_ACCESS = ("lea", "nop", "call", "j")


class Trace(NamedTuple):
    """What a call has executed.

    Attributes:
        blocks: The blocks of instructions of all kernels.
        counts: How often each was executed.
        steps: The last of what was executed: -1 - the number of a block, and after it the addresses of its accesses.
    """

    blocks: Sequence[tuple[str, ...]]
    counts: Sequence[int]
    steps: Sequence[int]


class Recorder:
    """A module's kernels in a library that writes down what they do; directory is for its files."""

    def __init__(self, module: Any, directory: Path) -> None:
        assembly, self.blocks = recording(module.sources["asm"])
        text = module.sources["host"]
        with native.compiling_host(text, directory, host.headers(text)) as compiling:
            tables = {constant.name: constant.data for constant in module.spec.constants}
            library = native.link(compiling, assembly, directory, (*CPU_ENTRY_POINTS, _NAME), tables)
        self.module = type(module)(library.read_bytes(), module.manifest, tvm_ffi.load_module(str(library)))
        self.module.num_threads = 1
        size = len(self.blocks) + 1 + _RING
        words = (ctypes.c_int64 * size).in_dll(ctypes.CDLL(str(library)), _SYMBOL)
        self._words = np.ctypeslib.as_array(words)

    def trace(self) -> Trace:
        """What has been executed since the last time."""
        count = len(self.blocks)
        counts, end, ring = self._words[:count], int(self._words[count]), self._words[count + 1 :]
        steps = np.roll(ring, -end)
        found = Trace(self.blocks, counts.tolist(), steps[np.argmax(steps < 0) :].tolist())
        self._words[:] = 0
        return found


def accesses(instruction: str) -> str:
    """The address that an instruction reads, writes or fetches, where it is known by registers alone; else ""."""
    found = _ADDRESS.search(instruction)
    gathers = found is not None and "mm" in found[1]
    return "" if found is None or gathers or instruction.startswith(_NO_ACCESS) or "%rip" in instruction else found[1]


def recording(assembly: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Assembly that writes down what it does, file by file, of which the last has what is written; and its blocks."""
    lines: list[str] = []
    blocks: list[list[str]] = []
    begins = True
    for line in assembly.splitlines():
        instruction = line.strip()
        if not line.startswith("\t") or instruction.startswith((".", "#")):
            begins = begins or _LABEL.match(line) is not None
            lines.append(line)
            continue
        if begins:
            lines += _noting(f"movq ${-len(blocks) - 1}, %rcx", counting=8 * len(blocks))
            blocks.append([])
        if address := accesses(instruction):
            lines += _noting(f"leaq {address}, %rcx")
        lines.append(line)
        blocks[-1].append(instruction)
        begins = instruction.startswith(("j", "ret"))
    sizes = {"counts": 8 * len(blocks), "end": 8, "ring": 8 * _RING, "rax": 8, "rcx": 8, "value": 8}
    symbols = [_SYMBOL, *(f"trace_{name}" for name in (*sizes, "high"))]
    data = [
        "    .data",
        *(f"    .globl {name}" for name in symbols),
        *(f"    .hidden {name}" for name in symbols[1:]),
        f"    .type {_SYMBOL}, @object",
        f"    .size {_SYMBOL}, {sum(list(sizes.values())[:3])}",
        f"    .balign 64\n{_SYMBOL}:",
        *(f"trace_{name}: .zero {size}" for name, size in sizes.items()),
        f"trace_high: .byte {', '.join(str(high % (_RING >> 16)) for high in range(256))}",
        _END,
    ]
    files = "\n".join([*lines, *data]).split(_END)[:-1]
    return [f"{file}{_END}\n" for file in files], [tuple(block) for block in blocks]


def _noting(value: str, counting: int | None = None) -> list[str]:
    """Instructions that put into the ring what `value` leaves in rcx, and count in a word at some byte of the counts.

    By lea and moves alone, which leave the flags; the ring's end wraps around by its third byte, looked up in a table.
    """
    word = f"trace_counts+{counting}(%rip)"
    count = [f"movq {word}, %rax", "leaq 1(%rax), %rax", f"movq %rax, {word}"]
    return [
        *("movq %rax, trace_rax(%rip)", "movq %rcx, trace_rcx(%rip)"),
        value,
        *(count if counting is not None else ()),
        *("movq %rcx, trace_value(%rip)", "movq trace_end(%rip), %rax"),
        *(
            "leaq trace_ring(%rip), %rcx",
            "leaq (%rcx,%rax,8), %rcx",
            "movq trace_value(%rip), %rax",
            "movq %rax, (%rcx)",
        ),
        *("movq trace_end(%rip), %rax", "leaq 1(%rax), %rax", "movq %rax, trace_end(%rip)"),
        *("movzbl trace_end+2(%rip), %eax", "leaq trace_high(%rip), %rcx", "movzbl (%rcx,%rax), %eax"),
        *("movb %al, trace_end+2(%rip)", "movq trace_rcx(%rip), %rcx", "movq trace_rax(%rip), %rax"),
    ]
