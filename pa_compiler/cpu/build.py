"""IRModule -> assembly, by TVM's LLVM code generator."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pa_compiler import interrupts
from pa_compiler.backend import Links
from pa_compiler.cpu import places, stack
from pa_compiler.cpu.target import CpuTarget

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.runtime import Executable, Module


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiled kernels: LLVM's text, the assembly that is linked, and which sblock each line of them comes from."""

    llvm: str
    asm: str
    links: Links


def compile_kernels(mod: IRModule, target: CpuTarget, directory: Path) -> Kernels:
    """Compile scheduled PrimFuncs with TVM's LLVM code generator; directory is for its intermediate file.

    LLVM generates machine code once, as text: what a reader of Kernels.asm sees is what runs.

    Raises:
        OSError: the intermediate file cannot be written.
        RuntimeError: it cannot be read back, as from a directory whose name is not UTF-8.
    """
    marked, known = places.mark(mod)
    emitted = translate(marked, target).mod.inspect_source("ll")
    interrupts.check()
    text = directory / "kernels.ll"
    llvm = _read(_without_debug_info(emitted), text).inspect_source("ll").removeprefix(f"; ModuleID = '{text}'\n")
    interrupts.check()
    asm, of_asm = places.apart(_read(places.with_locations(emitted), text).inspect_source("asm"), llvm)
    return Kernels(llvm, asm, Links.made(known, {"llvm": places.of_llvm(emitted, llvm), "asm": of_asm}))


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

    TVM's simplification is left out, which takes float32 for real numbers and divisors for what is not 0: what kernels
    say of NaN and of a division by 0 would not last.
    """
    import tvm
    from tvm.target import Target

    # The asserts are TVM's own checks of the arguments: only the host calls the kernels, and has checked more.
    # Rewriting storage would put register sums into the memory of larger buffers, where LLVM leaves them.
    config = {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": True}
    # Nor do these leave less to LLVM, which simplifies indices, hoists what is invariant and drops empty loops itself.
    # Virtual threads and permuted layouts are of GPUs.
    needless = [
        "s_tir.HoistIfThenElse",
        "s_tir.InjectPermutedLayout",
        "s_tir.InjectVirtualThread",
        "s_tir.RenormalizeSplitPattern",
        "s_tir.StmtSimplify",
        "tirx.CommonSubexprElim",
        "tirx.RemoveNoOp",
    ]
    with tvm.transform.PassContext(config=config, disabled_pass=needless):
        return tvm.compile(mod, target=Target(json.loads(target.config)), tir_pipeline=stack.pipeline())


def _without_debug_info(llvm: str) -> str:
    """LLVM's text without DWARF, which would be three quarters of the assembly and names no line of any source."""
    text = re.sub(r"\n +#dbg_\w+\(.*\)|\n!llvm\.dbg\.cu = .*", "", llvm)
    for mark in (r", !dbg ![0-9]+", r" !dbg ![0-9]+"):  # each begins with plain text, which is found faster
        text = re.sub(mark, "", text)
    return text
