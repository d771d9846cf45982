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
    host: str, directory: Path, headers: Mapping[str, str] | None = None, machine: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """Compile the host C++ to directory/host.o with the system compiler, beside whatever the caller does meanwhile.

    Its headers, texts by their places, are written to directory/include; machine is as cxx takes it. Yields the
    compiler's process, which link() waits for; it ends with the context.

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
        *("-I", str(directory / "include")),
        *(flag for path in dict.fromkeys(includes) for flag in ("-isystem", path)),
        "-c",
        str(source),
        "-o",
        str(directory / "host.o"),
    ]
    with commands.start(command, environment=_temporaries(directory)) as process:
        yield process


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
    what = f"the C++ compiler {shlex.join(cxx(machine))}"
    commands.finish(compiling, what, directory / "host.o")
    exports, library = directory / "exports.map", directory / "pa.so"
    data = [embedded(name, table, directory) for name, table in (tables or {}).items()]
    assembly = {directory / f"kernels{number}.s": text for number, text in enumerate([*kernels, *data])}
    for path, text in assembly.items():
        path.write_text(text)
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
    with commands.start(command, environment=_temporaries(directory)) as process:
        commands.finish(process, what, library)
    return library


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
    variable, default = "CXX", "g++"
    if not _is_here(machine):
        variable, default = f"CXX_{machine}", f"{machine.replace('_', '-')}-linux-gnu-g++"
    program, *words = commands.words(variable, default)
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(
            f"the C++ compiler {program!r} is not on PATH; pa_compiler needs {default} to build the host code "
            f"({_install(machine)}), or another by the variable {variable}"
        )
    return [path, *words]


def _install(machine: str) -> str:
    if _is_here(machine):
        return "Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++"
    name = machine.replace("_", "-")
    return f"Debian and Ubuntu: apt-get install g++-{name}-linux-gnu"
