"""IRModule -> assembly, by TVM's LLVM code generator."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pa_compiler import interrupts
from pa_compiler.backend import Links
from pa_compiler.cpu import passes, places
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.tiles import LLVM_LEVEL

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.runtime import Executable, Module


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiled kernels, each a module of LLVM's, in the order of their names.

    Attributes:
        llvm: LLVM's texts.
        asm: The assembly of each, which is linked.
        links: Which sblock each line of the texts comes from, where one follows the other.
    """

    llvm: tuple[str, ...]
    asm: tuple[str, ...]
    links: Links


def compile_kernels(mod: IRModule, target: CpuTarget, directory: Path, *, linked: bool = True) -> Kernels:
    """Compile scheduled PrimFuncs with TVM's LLVM code generator; directory is for its intermediate files.

    LLVM generates machine code once, as text: what a reader of Kernels.asm sees is what runs. It has each kernel as a
    module of its own, so that several are compiled at once; no kernel calls another. Where its lines need not be linked
    to sblocks, the same code takes less time.

    Raises:
        OSError: an intermediate file cannot be written.
        RuntimeError: it cannot be read back, as from a directory whose name is not UTF-8.
    """
    marked, known = places.mark(mod) if linked else (mod, ())
    passes.pipeline()  # registers it, before there are threads

    def compiled(number: int, function: IRModule) -> tuple[str, str, list[int], list[int]]:
        emitted = emit(function, target, number)
        interrupts.check()
        text = directory / f"kernel{number}.ll"
        read = _read(_without_debug_info(emitted), text)
        llvm = read.inspect_source("ll").removeprefix(f"; ModuleID = '{text}'\n")
        interrupts.check()
        if not linked:
            return llvm, numbered(read.inspect_source("asm"), number), [], []
        asm, of_asm = places.apart(_read(places.with_locations(emitted), text).inspect_source("asm"), llvm)
        return llvm, numbered(asm, number), places.of_llvm(emitted, llvm), of_asm

    llvm, asm, of_llvm, of_asm = zip(*interrupts.in_threads(compiled, apart(marked)), strict=True)
    chained = itertools.chain.from_iterable
    return Kernels(llvm, asm, Links.made(known, {"llvm": chained(of_llvm), "asm": chained(of_asm)}))


def apart(mod: IRModule) -> dict[int, IRModule]:
    """The kernels of a module, in the order of their names, each with its number."""
    from tvm import IRModule

    functions = sorted((variable.name_hint, function) for variable, function in mod.functions.items())
    return {number: IRModule(dict([named])) for number, named in enumerate(functions)}


def emit(kernel: IRModule, target: CpuTarget, number: int) -> str:
    """LLVM's text of a kernel, as TVM emits it; that of kernel 0 has what a library needs once."""
    emitted = translate(kernel, target).mod.inspect_source("ll")
    emitted = _ALLOCA.sub(rf"\g<1>{4 * target.vector_lanes}", emitted)
    return _CONVERSION.sub("", emitted) if number else emitted


def numbered(asm: str, number: int) -> str:
    """The assembly of a kernel with labels that those of others do not have: .LBB20_3 is of kernel 2."""
    return _LABEL.sub(lambda label: f"{label[1]}{int(label[2]) + 10 * number}", asm) if number else asm


_LABEL = re.compile(r"(\.L[A-Za-z]+(?:_[a-z]+)?)(\d+)")
"""LLVM's labels, which count the functions of a module: .LBB0_3, .LCPI0_1, .Lfunc_end0. A kernel's is the first; the
module of kernel 0 has a few more."""

_ALLOCA = re.compile(r"(= alloca .*, align )16\b")
"""Buffers on the stack, which TVM aligns to 16 bytes on every target. A vector that is not aligned to its own size may
lie in two lines of the first-level cache; and where no buffer asks for more, LLVM does not align what it spills."""

_CONVERSION = re.compile(r"^(; Function Attrs: .*\n)?define weak .*\n(.*\n)*?}\n\n?", re.MULTILINE)
"""Functions that TVM adds to every module: conversions of float16 for CPUs without them."""


def _read(llvm: str, text: Path) -> Module:
    """What LLVM reads from a text, which is written to a file for it."""
    import tvm

    text.write_text(llvm)
    try:
        return tvm.runtime.load_module(str(text))
    except UnicodeEncodeError as error:
        raise RuntimeError(
            f"{os.fsencode(text.parent)!r}: expected a directory whose name is UTF-8, for TVM to read from; "
            "PA_CACHE_DIR names another one, and TMPDIR where there is no cache"
        ) from error
    except RuntimeError as error:  # which may say no more than "Input/output error"
        raise RuntimeError(f"{text}: LLVM cannot read what it has written: {error}") from error


def translate(mod: IRModule, target: CpuTarget) -> Executable:
    """Scheduled PrimFuncs in LLVM's terms, which TVM can call.

    LLVM optimizes them at the lowest level that one of them asks for.

    TVM's simplification is left out, which takes float32 for real numbers and divisors for what is not 0: what kernels
    say of NaN and of a division by 0 would not last.
    """
    import tvm
    from tvm.target import Target

    # The asserts are TVM's own checks of the arguments: only the host calls the kernels, and has checked more.
    # Rewriting storage would put register sums into the memory of larger buffers, where LLVM leaves them.
    config = {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": True}
    # Nor do these leave less to LLVM, which simplifies indices, hoists what is invariant and drops empty loops itself.
    # Virtual threads and permuted layouts are of GPUs. An entry function would be one more name for a lone kernel.
    needless = [
        passes.COMPACTION,  # of all buffers; the pipeline has its own
        "s_tir.HoistIfThenElse",
        "s_tir.InjectPermutedLayout",
        "s_tir.InjectVirtualThread",
        "s_tir.RenormalizeSplitPattern",
        "s_tir.StmtSimplify",
        "tirx.AnnotateEntryFunc",
        "tirx.CommonSubexprElim",
        "tirx.RemoveNoOp",
    ]
    level = min(int(function.attrs.get(LLVM_LEVEL, 3)) for function in mod.functions.values())
    of_tvm = target.of_tvm if level == 3 else target.of_tvm | {"opt-level": level}
    with tvm.transform.PassContext(config=config, disabled_pass=needless):
        return tvm.compile(mod, target=Target(of_tvm), tir_pipeline=passes.pipeline())


def _without_debug_info(llvm: str) -> str:
    """LLVM's text without DWARF, which would be three quarters of the assembly and names no line of any source."""
    text = re.sub(r"\n +#dbg_\w+\(.*\)|\n!llvm\.dbg\.cu = .*", "", llvm)
    for mark in (r", !dbg ![0-9]+", r" !dbg ![0-9]+"):  # each begins with plain text, which is found faster
        text = re.sub(mark, "", text)
    return text
