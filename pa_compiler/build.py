"""IRModule -> object file, and host C++ + object file -> one shared library that needs tvm-ffi alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import tvm_ffi.libinfo
from tvm import IRModule
from tvm import compile as tvm_compile
from tvm.target import Target

from pa_compiler.target import CpuTarget

_COMPILE_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")

# Only the entry points leave the library: two of them in one process do not see each other's kernels.
_ENTRY_POINTS = ("decode", "append_kv", "plan", "manifest", "view_as_bfloat16")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiled kernels: the object file's bytes, and LLVM's and the assembler's text."""

    object_code: bytes
    llvm: str
    asm: str


def compile_kernels(mod: IRModule, target: CpuTarget, directory: Path) -> Kernels:
    """Compile scheduled PrimFuncs with TVM's LLVM code generator; directory is for its intermediate file."""
    executable = tvm_compile(mod, target=Target(json.loads(target.config)))
    object_file = directory / "kernels.o"
    executable.mod.write_to_file(str(object_file), "o")
    return Kernels(
        object_code=object_file.read_bytes(),
        llvm=executable.mod.inspect_source("ll"),
        asm=executable.mod.inspect_source("asm"),
    )


def link(host: str, kernels: Kernels, directory: Path) -> Path:
    """Compile the host C++ with the system compiler (CXX, by default g++) and link everything into directory/pa.so.

    Raises:
        RuntimeError: the compiler is missing, or refuses the code.
    """
    source, object_file, exports = directory / "host.cc", directory / "kernels.o", directory / "exports.map"
    source.write_text(host)
    object_file.write_bytes(kernels.object_code)
    exports.write_text(f"{{ global: {' '.join(f'__tvm_ffi_{name};' for name in _ENTRY_POINTS)} local: *; }};\n")
    library = directory / "pa.so"
    includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())  # often the same
    command = [
        cxx(),
        *_COMPILE_FLAGS,
        *(flag for path in dict.fromkeys(includes) for flag in ("-isystem", path)),
        *(str(path) for path in (source, object_file)),
        "-shared",
        f"-Wl,--version-script={exports}",
        "-Wl,--no-undefined",
        "-Wl,-z,nodelete",  # its threads outlive the module that loaded it
        f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}",
        "-ltvm_ffi",
        "-lm",
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode} on {source}:\n{done.stderr}")
    return library


def cxx() -> str:
    """The path of the C++ compiler.

    Raises:
        RuntimeError: there is none.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(
            f"the C++ compiler {name!r} is not on PATH; pa_compiler needs g++ to build the host code "
            "(Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++), or another by the variable CXX"
        )
    return path
