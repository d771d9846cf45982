"""Host C++ + the kernels' assembly -> one shared library that needs tvm-ffi alone, for every target.

For another architecture than this machine's, by a compiler for that one.
"""

from __future__ import annotations

import contextlib
import os
import platform
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
    host: str,
    directory: Path,
    headers: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    machine: str = "",
) -> Iterator[subprocess.Popen[str]]:
    """Compile the host C++ to directory/host.o with the system compiler, beside whatever the caller does meanwhile.

    Its headers, texts by their places, are written to directory/include. Yields the compiler's process, which link()
    waits for; it ends with the context. flags are further ones for it; machine is as cxx takes it.

    Raises:
        RuntimeError: there is no compiler, or the system cannot run it.
    """
    source = directory / "host.cc"
    source.write_text(host)
    write_headers(headers or {}, directory / "include")
    includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())  # often the same
    command = [
        *cxx(machine),
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
def compiling_part(text: str, directory: Path, headers: Mapping[str, str], machine: str = "") -> Iterator[None]:
    """As compiling_host, for a part of a bundle. At the end of the context there is directory/host.o.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    with compiling_host(text, directory, headers, _IN_BUNDLE, machine) as process:
        yield
        finish_host(process, directory, machine)


def rename_symbols(source: Path, names: Mapping[str, str], made: Path, machine: str = "") -> None:
    """Copy an object file with other names for some of its symbols.

    Raises:
        RuntimeError: there is no objcopy, or it failed.
    """
    renames = made.with_suffix(".names")
    renames.write_text("".join(f"{old} {new}\n" for old, new in names.items()))
    run([*tool("OBJCOPY", machine), f"--redefine-syms={renames}", str(source), str(made)], made)


_TOOLS = {"OBJCOPY": "objcopy", "AR": "ar"}
_ASSEMBLER = {"aarch64": "\t.arch armv8.6-a+fp16+sve2\n"}
"""What an assembler is told, by the architecture, to take all instructions that kernels for it may have."""


def tool(variable: str, machine: str = "") -> list[str]:
    """The command of a tool of binutils: what a variable of its name names, or else the one that make would take.

    For another architecture as cxx has it: OBJCOPY_aarch64, aarch64-linux-gnu-objcopy.

    Raises:
        RuntimeError: there is none.
    """
    variable, default = _for(machine, variable, _TOOLS[variable])
    program, *words = commands.words(variable, default)
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
    kernels: Sequence[str],
    directory: Path,
    entry_points: Sequence[str],
    tables: Mapping[str, bytes] | None = None,
    machine: str = "",
) -> Path:
    """Wait for the host's object file, assemble the kernels' texts, and link all of it into directory/pa.so.

    Tables are bytes by the names of symbols at which the host finds them; machine is as cxx takes it.

    Only the entry points leave the library: two of them in one process do not see each other's kernels.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    finish_host(compiling, directory, machine)
    exports, library = directory / "exports.map", directory / "pa.so"
    assembly = _write_assembly(kernels, directory, tables or {}, machine)
    exports.write_text(f"{{ global: {' '.join(f'__tvm_ffi_{name};' for name in entry_points)} local: *; }};\n")
    command = [
        *cxx(machine),
        str(directory / "host.o"),
        *map(str, assembly),
        "-shared",
        "-pthread",
        *("-Xlinker", f"--version-script={exports}"),  # -Wl would take the path apart at a comma
        "-Wl,--no-undefined",
        "-Wl,-z,now",  # a function that another libtvm_ffi lacks is an error of load(), not the end of the process
        "-Wl,-z,nodelete",  # its threads outlive the module that loaded it, and so does what a driver keeps for it
        f"-L{_tvm_ffi(machine, directory)}",
        "-ltvm_ffi",
        "-lm",
        "-ldl",
        "-o",
        str(library),
    ]
    run(command, library)
    return library


def finish_host(compiling: subprocess.Popen[str], directory: Path, machine: str = "") -> None:
    """Wait for directory/host.o.

    Raises:
        RuntimeError: the compiler refuses the code.
    """
    commands.finish(compiling, f"the C++ compiler {shlex.join(cxx(machine))}", directory / "host.o")


def assemble(kernels: Sequence[str], directory: Path, tables: Mapping[str, bytes], machine: str = "") -> None:
    """Assemble the kernels' texts, and tables as for link(), to directory/kernels.o.

    Raises:
        RuntimeError: the compiler refuses them.
    """
    made = directory / "kernels.o"
    sources = _write_assembly(kernels, directory, tables, machine)
    run([*cxx(machine), "-r", "-nostdlib", *map(str, sources), "-o", str(made)], made)


def run(command: Sequence[str], made: Path) -> None:
    """Run a compiler, a linker or the like, which leaves a file. Files of its own are beside that.

    Raises:
        RuntimeError: it fails.
    """
    with commands.start(command, environment=_temporaries(made.parent)) as process:
        what = "" if Path(command[0]).name.endswith(tuple(_TOOLS.values())) else "the C++ compiler "
        commands.finish(process, f"{what}{shlex.join(command[:1])}", made)


def _write_assembly(kernels: Sequence[str], directory: Path, tables: Mapping[str, bytes], machine: str) -> list[Path]:
    begin = _ASSEMBLER.get(machine or platform.machine(), "")
    data = [embedded(name, table, directory) for name, table in tables.items()]
    assembly = {directory / f"kernels{number}.s": text for number, text in enumerate([*kernels, *data])}
    for path, text in assembly.items():
        path.write_text(begin + text)
    return list(assembly)


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


def _tvm_ffi(machine: str, directory: Path) -> Path:
    """The directory of the libtvm_ffi.so to link with.

    For another architecture it is one without code: the linker reads names alone, and the functions that the two have
    in common are those of one version.
    """
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    if _is_here(machine):
        return library.parent
    folder = directory / "stub"
    folder.mkdir(exist_ok=True)
    listed = [*commands.words("NM", "nm"), "-D", "--defined-only", "--format=posix", str(library)]
    with commands.start(listed) as process:
        printed = commands.finish(process, shlex.join(listed), library)
    names = sorted({line.split(" ", 1)[0] for line in printed.splitlines() if line.startswith("TVMFFI")})
    stub, made = folder / "stub.s", folder / "libtvm_ffi.so"
    stub.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names))
    command = [*cxx(machine), str(stub), "-shared", "-nostdlib", "-Wl,-soname,libtvm_ffi.so", "-o", str(made)]
    with commands.start(command, environment=_temporaries(directory)) as process:
        commands.finish(process, shlex.join(command), made)
    return folder


def _is_here(machine: str) -> bool:
    return machine in ("", platform.machine())


def cxx(machine: str = "") -> list[str]:
    """The command of the C++ compiler for an architecture, by its name in platform.machine(), or "" for this machine's.

    What CXX names, or else g++; for another architecture, of which Debian's compilers begin with the name, what the
    variable with its name names, such as CXX_aarch64, or else aarch64-linux-gnu-g++.

    Raises:
        RuntimeError: there is none.
    """
    variable, default = _for(machine, "CXX", "g++")
    program, *words = commands.words(variable, default)
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(
            f"the C++ compiler {program!r} is not on PATH; pa_compiler needs {default} to build the host code "
            f"({_install(machine)}), or another by the variable {variable}"
        )
    return [path, *words]


def _for(machine: str, variable: str, program: str) -> tuple[str, str]:
    """The variable and the program for an architecture, of those for this machine's."""
    if _is_here(machine):
        return variable, program
    return f"{variable}_{machine}", f"{machine.replace('_', '-')}-linux-gnu-{program}"


def _install(machine: str) -> str:
    if _is_here(machine):
        return "Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++"
    name = machine.replace("_", "-")
    return f"Debian and Ubuntu: apt-get install g++-{name}-linux-gnu"
