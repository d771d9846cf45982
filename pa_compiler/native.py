"""Host C++ + the kernels' assembly -> one shared library that needs tvm-ffi alone, for every target."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tvm_ffi.libinfo

from pa_compiler import commands

_COMPILE_FLAGS = ("-std=c++17", "-Og", "-fPIC", "-pthread", "-fvisibility=hidden")

_IN_BUNDLE = ("-DPA_WITHOUT_OBJECTS", "-fno-gnu-unique")
"""Further flags for what becomes a part of a bundle."""

_EMBEDDED = """\
    .section .rodata
    .balign 64
    .globl {name}
    .hidden {name}
    .type {name}, @object
{name}:
    .incbin {path}
    .size {name}, . - {name}
    .section .note.GNU-stack, "", @progbits
"""


@contextlib.contextmanager
def compiling_host(
    host: str, directory: Path, headers: Mapping[str, str] | None = None, flags: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Compile the host C++ to directory/host.o with the system compiler, beside whatever the caller does meanwhile.

    Its headers, texts by their places, are written to directory/include. Yields the compiler's process, which link()
    waits for; it ends with the context. flags are further ones for it.

    Raises:
        RuntimeError: there is no compiler, or the system cannot run it.
    """
    source = directory / "host.cc"
    source.write_text(host)
    write_headers(headers or {}, directory / "include")
    includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())  # often the same
    command = [
        *cxx(),
        *_COMPILE_FLAGS,
        *flags,
        *("-I", str(directory / "include")),
        *(flag for path in dict.fromkeys(includes) for flag in ("-isystem", path)),
        "-c",
        str(source),
        "-o",
        str(directory / "host.o"),
    ]
    with commands.start(command, environment=_temporaries(directory)) as process:
        yield process


@contextlib.contextmanager
def compiling_part(text: str, directory: Path, headers: Mapping[str, str]) -> Iterator[None]:
    """As compiling_host, for a part of a bundle. At the end of the context there is directory/host.o.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    with compiling_host(text, directory, headers, _IN_BUNDLE) as process:
        yield
        finish_host(process, directory)


def rename_symbols(source: Path, names: Mapping[str, str], made: Path) -> None:
    """Copy an object file with other names for some of its symbols.

    Raises:
        RuntimeError: there is no objcopy, or it failed.
    """
    renames = made.with_suffix(".names")
    renames.write_text("".join(f"{old} {new}\n" for old, new in names.items()))
    run([*tool("OBJCOPY"), f"--redefine-syms={renames}", str(source), str(made)], made)


_TOOLS = {"OBJCOPY": "objcopy", "AR": "ar"}


def tool(variable: str) -> list[str]:
    """The command of a tool of binutils: what a variable of its name names, or else the one that make would take.

    Raises:
        RuntimeError: there is none.
    """
    program, *words = commands.words(variable, _TOOLS[variable])
    if (path := shutil.which(program)) is None:
        raise RuntimeError(
            f"{program!r} is not on PATH; a bundle needs it, from binutils, where the linker is, or another by the "
            f"variable {variable}"
        )
    return [path, *words]


def write_headers(headers: Mapping[str, str], directory: Path) -> None:
    """Write headers to their places below a directory, which need not be there."""
    for place, text in headers.items():
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        (directory / place).write_text(text)


def link(
    compiling: subprocess.Popen[str],
    kernels: str,
    directory: Path,
    entry_points: Sequence[str],
    tables: Mapping[str, bytes] | None = None,
) -> Path:
    """Wait for the host's object file, assemble the kernels, and link both into directory/pa.so.

    Tables are bytes by the names of symbols at which the host finds them.

    Only the entry points leave the library: two of them in one process do not see each other's kernels.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    finish_host(compiling, directory)
    exports, library = directory / "exports.map", directory / "pa.so"
    assembly = _write_assembly(kernels, directory, tables or {})
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
    run(command, library)
    return library


def finish_host(compiling: subprocess.Popen[str], directory: Path) -> None:
    """Wait for directory/host.o.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    commands.finish(compiling, f"the C++ compiler {shlex.join(cxx())}", directory / "host.o")


def assemble(kernels: str, directory: Path, tables: Mapping[str, bytes]) -> None:
    """Assemble kernels, and tables as for link(), to directory/kernels.o.

    Raises:
        RuntimeError: the compiler refuses them.
    """
    made = directory / "kernels.o"
    run([*cxx(), "-c", str(_write_assembly(kernels, directory, tables)), "-o", str(made)], made)


def run(command: Sequence[str], made: Path) -> None:
    """Run a compiler, a linker or the like, which leaves a file. Files of its own are beside that.

    Raises:
        RuntimeError: it fails.
    """
    with commands.start(command, environment=_temporaries(made.parent)) as process:
        what = f"the C++ compiler {shlex.join(cxx())}" if command[: len(cxx())] == cxx() else shlex.join(command[:1])
        commands.finish(process, what, made)


def _write_assembly(kernels: str, directory: Path, tables: Mapping[str, bytes]) -> Path:
    assembly = directory / "kernels.s"
    data = (embedded(name, table, directory) for name, table in tables.items())
    assembly.write_text("".join([kernels, *data]))
    return assembly


def embedded(name: str, data: bytes, directory: Path) -> str:
    """Assembly of read-only data from a symbol on, a line of the CPU's caches, that other libraries do not see.

    It names a file in the directory.
    """
    path = directory / f"{name}.bin"
    path.write_bytes(data)
    plain = re.compile(rb"[\w /.,+-]", re.ASCII)  # what stands for itself between the assembler's quotes
    quoted = "".join(chr(byte) if plain.match(bytes([byte])) else f"\\{byte:03o}" for byte in os.fsencode(path))
    return _EMBEDDED.format(name=name, path=f'"{quoted}"')


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
