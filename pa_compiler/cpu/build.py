"""IRModule -> assembly, and host C++ + assembly -> one shared library that needs tvm-ffi alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tvm_ffi.libinfo

from pa_compiler import commands, interrupts
from pa_compiler.cpu import instructions
from pa_compiler.cpu.target import CpuTarget

if TYPE_CHECKING:
    from tvm import IRModule

_COMPILE_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden")

ENTRY_POINTS = ("decode", "append_kv", "plan", "cpu_set", "openmp", "view_as_bfloat16")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiled kernels: LLVM's text, and the assembly that is linked."""

    llvm: str
    asm: str


def script(mod: IRModule) -> str:
    """TVMScript, in the same words under every Python: from 3.12 on TVM would declare type variables another way."""
    return str(mod.script(extra_config={"relax.use_pep695": False})) + "\n"


def compile_kernels(mod: IRModule, target: CpuTarget, directory: Path) -> Kernels:
    """Compile scheduled PrimFuncs with TVM's LLVM code generator; directory is for its intermediate file.

    LLVM generates machine code once, as text: what a reader of Kernels.asm sees is what runs.

    Raises:
        OSError: the intermediate file cannot be written.
        RuntimeError: it cannot be read back, as from a directory whose name is not UTF-8.
    """
    import tvm
    from tvm.target import Target

    # The asserts are TVM's own checks of the arguments: only the host calls the kernels, and has checked more.
    # Rewriting storage would put register sums into the memory of larger buffers, where LLVM leaves them.
    config = {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": True}
    # Nor do these leave less to LLVM, which simplifies indices, hoists what is invariant and drops empty loops itself.
    needless = [
        "s_tir.HoistIfThenElse",
        "s_tir.RenormalizeSplitPattern",
        "s_tir.StmtSimplify",
        "tirx.CommonSubexprElim",
        "tirx.RemoveNoOp",
    ]
    with tvm.transform.PassContext(config=config, disabled_pass=needless):
        executable = tvm.compile(instructions.select(mod, target), target=Target(json.loads(target.config)))
    interrupts.check()
    text = directory / "kernels.ll"
    text.write_text(_without_debug_info(executable.mod.inspect_source("ll")))
    try:
        module = tvm.runtime.load_module(str(text))
    except UnicodeEncodeError as error:
        raise RuntimeError(
            f"{os.fsencode(directory)!r}: expected a directory whose name is UTF-8, for TVM to read from; PA_CACHE_DIR "
            "names another one, and TMPDIR where there is no cache"
        ) from error
    except RuntimeError as error:  # which may say no more than "Input/output error"
        raise RuntimeError(f"{text}: LLVM cannot read what it has written: {error}") from error
    llvm = module.inspect_source("ll").removeprefix(f"; ModuleID = '{text}'\n")
    interrupts.check()
    return Kernels(llvm=llvm, asm=module.inspect_source("asm"))


def _without_debug_info(llvm: str) -> str:
    """LLVM's text without DWARF, which would be three quarters of the assembly and names no line of any source."""
    text = re.sub(r"^ *#dbg_\w+\(.*\)\n|^!llvm\.dbg\.cu = .*\n", "", llvm, flags=re.MULTILINE)
    return re.sub(r",? !dbg ![0-9]+", "", text)


@contextlib.contextmanager
def compiling_host(host: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Compile the host C++ to directory/host.o with the system compiler, beside whatever the caller does meanwhile.

    Yields the compiler's process, which link() waits for; it ends with the context.

    Raises:
        RuntimeError: there is no compiler, or the system cannot run it.
    """
    source = directory / "host.cc"
    source.write_text(host)
    includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())  # often the same
    command = [
        *cxx(),
        *_COMPILE_FLAGS,
        *(flag for path in dict.fromkeys(includes) for flag in ("-isystem", path)),
        "-c",
        str(source),
        "-o",
        str(directory / "host.o"),
    ]
    with commands.start(command, environment=_temporaries(directory)) as process:
        yield process


def link(
    compiling: subprocess.Popen[str], kernels: str, directory: Path, entry_points: Sequence[str] = ENTRY_POINTS
) -> Path:
    """Wait for the host's object file, assemble the kernels, and link both into directory/pa.so.

    Only the entry points leave the library: two of them in one process do not see each other's kernels.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    what = f"the C++ compiler {shlex.join(cxx())}"
    commands.finish(compiling, what, directory / "host.o")
    assembly, exports, library = directory / "kernels.s", directory / "exports.map", directory / "pa.so"
    assembly.write_text(kernels)
    exports.write_text(f"{{ global: {' '.join(f'__tvm_ffi_{name};' for name in entry_points)} local: *; }};\n")
    command = [
        *cxx(),
        str(directory / "host.o"),
        str(assembly),
        "-shared",
        "-pthread",
        *("-Xlinker", f"--version-script={exports}"),  # -Wl would take the path apart at a comma
        "-Wl,--no-undefined",
        "-Wl,-z,now",  # a function that another libtvm_ffi lacks is an error of load(), not the end of the process
        "-Wl,-z,nodelete",  # its threads outlive the module that loaded it, and so does what a driver keeps for it
        f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}",
        "-ltvm_ffi",
        "-lm",
        "-ldl",
        "-o",
        str(library),
    ]
    with commands.start(command, environment=_temporaries(directory)) as process:
        commands.finish(process, what, library)
    return library


def _temporaries(directory: Path) -> dict[str, str]:
    """Compilers write files of their own where this says; elsewhere they may not, or leave them if they are killed."""
    return {"TMPDIR": str(directory)}


def cxx() -> list[str]:
    """The command of the C++ compiler: what CXX names, or else g++.

    Raises:
        RuntimeError: there is none.
    """
    program, *words = commands.words("CXX", "g++")
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(
            f"the C++ compiler {program!r} is not on PATH; pa_compiler needs g++ to build the host code "
            "(Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++), or another by the variable CXX"
        )
    return [path, *words]
