"""From the CUDA kernels to machine code: TVM emits CUDA C, nvcc compiles it, and both say what came out."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pa_compiler import commands
from pa_compiler.cuda import lines

if TYPE_CHECKING:
    from tvm import IRModule

_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-diag-suppress=177")  # 177: functions of TVM's preamble are not used

_REPORT = re.compile(
    r"Compiling entry function '(\w+)_kernel'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU, as ptxas reports it.

    Attributes:
        registers: Of one thread.
        stack_bytes: Of one thread.
        spill_bytes: Stored and loaded because registers did not do.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture.

    Attributes:
        ptx: The text that it was assembled from.
        image: The ELF file.
        resources: Of each kernel, by its name.
        located: The text with the lines of CUDA C that it comes from.
    """

    ptx: str
    image: bytes
    resources: dict[str, Resources]
    located: str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of an emitted kernel.

    Attributes:
        name: As in the PrimFunc; a buffer's without "_handle".
        type: In CUDA C, such as "int64_t" or "float*".
    """

    name: str
    type: str


def emit(mod: IRModule, arch: str, last: Callable[[IRModule], IRModule] = lambda mod: mod) -> str:
    """CUDA C of all kernels of a module, extern "C" under their names with "_kernel" after them.

    PrimFuncs with explicit threads and scheduled ones are lowered apart, and printed as one text. What is printed is
    what `last` makes of them.
    """
    from tvm import IRModule, tirx
    from tvm.target import Target
    from tvm.tirx import get_tir_pipeline
    from tvm.tirx.build import codegen_build, split_host_device_mods

    target = Target({"kind": "cuda", "arch": arch}, host={"kind": "cuda_host"})
    kernels: dict[object, object] = {}
    for name in ("tirx", "s_tir"):
        functions = {
            var: each for var, each in mod.functions.items() if bool(each.attrs.get("s_tir")) == (name == "s_tir")
        }
        if functions:
            lower, _, finish = get_tir_pipeline(name)
            lowered = lower(tirx.transform.BindTarget(target)(IRModule(functions)))
            (on_device,) = split_host_device_mods(lowered)[1].values()
            kernels |= finish()(on_device).functions
    return str(codegen_build(last(IRModule(kernels)), target).inspect_source())


def parameters(source: str, kernel: str) -> tuple[Parameter, ...]:
    """The parameters of an emitted kernel, in their order, which is not the PrimFunc's."""
    declared = re.search(rf"\b{kernel}_kernel\((.*?)\);", source)
    if declared is None:
        raise ValueError(f"kernel: expected one of the emitted kernels, got {kernel!r}")
    pairs = (text.replace("__restrict__ ", "").rsplit(maxsplit=1) for text in declared[1].split(", "))
    return tuple(Parameter(name.removesuffix("_ptr"), ctype) for ctype, name in pairs)


def assemble(source: str, arch: str, directory: Path) -> Cubin:
    """Compile CUDA C to machine code for one architecture, such as "sm_90", in a directory for scratch.

    Raises:
        RuntimeError: there is no nvcc, or it refuses the code; or the path of the directory has a $ or a ` in it.
    """
    if {"$", "`"} & set(os.path.abspath(directory)):
        raise RuntimeError(
            f"{directory}: expected a directory without $ and `, since nvcc gives its path to a shell; PA_CACHE_DIR "
            "names another one, and TMPDIR where there is no cache"
        )
    text, ptx, image = directory / "kernels.cu", directory / "kernels.ptx", directory / "kernels.cubin"
    text.write_text(source)
    named = f"/proc/self/cwd/{text.name}"  # PTX has the path that lines are of, and ptxas reads no quotes in it
    _run([*nvcc(), *_FLAGS, f"-arch={_virtual(arch)}", "-ptx", named, "-o", ptx.name], ptx)
    located = lines.outermost(ptx.read_text())
    ptx.write_text(lines.of_ptx(located)[0])
    report = _run([*nvcc(), "-Xptxas=-v", f"-arch={arch}", "-cubin", ptx.name, "-o", image.name], image)
    resources = {
        name: Resources(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in _REPORT.findall(report)
    }
    return Cubin(ptx.read_text(), image.read_bytes(), resources, located)


def fatbin(cubin: Cubin, arch: str, directory: Path) -> bytes:
    """The machine code and its PTX as one image, of which the driver takes what fits the GPU: PTX for a later one.

    Raises:
        RuntimeError: there is no fatbinary, which comes with nvcc.
    """
    image, ptx, both = (directory / f"bound.{suffix}" for suffix in ("cubin", "ptx", "fatbin"))
    image.write_bytes(cubin.image)
    ptx.write_text(cubin.ptx)
    number = arch.removeprefix("sm_")
    parts = [f"--image3=kind=elf,sm={number},file={image.name}", f"--image3=kind=ptx,sm={number},file={ptx.name}"]
    _run([tool("fatbinary"), f"--create={both.name}", "-64", *parts], both)
    return both.read_bytes()


def disassembly(cubin: Cubin, directory: Path) -> str:
    """SASS of all kernels.

    Raises:
        RuntimeError: there is no nvdisasm, or it refuses the code.
    """
    image = directory / "disassembled.cubin"
    image.write_bytes(cubin.image)
    return _run([tool("nvdisasm"), "-c", image.name], image)


def located_disassembly(cubin: Cubin, arch: str, directory: Path) -> str:
    """SASS of all kernels with the lines of CUDA C that it comes from. Errors as of disassembly.

    It is assembled once more: what says the lines is twice as large as what runs, and is in no library.
    """
    ptx, image = directory / "located.ptx", directory / "located.cubin"
    ptx.write_text(cubin.located)
    _run([*nvcc(), "-lineinfo", f"-arch={arch}", "-cubin", ptx.name, "-o", image.name], image)
    return _run([tool("nvdisasm"), "-c", "-g", image.name], image)


def disassemble(cubin: Cubin, directory: Path) -> dict[str, str]:
    """SASS of each kernel, by its name. Errors as of disassembly."""
    text = disassembly(cubin, directory)
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+)_kernel\b.*$", text, flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


def instructions(sass: str) -> Counter[str]:
    """How often each instruction occurs in a kernel's SASS, by its name with all that follows a point: "LDG.E.128"."""
    return Counter(_OPCODE.findall(sass))


def _virtual(arch: str) -> str:
    """The architecture of the PTX of sm_90: compute_90."""
    return arch.replace("sm_", "compute_")


def nvcc() -> list[str]:
    """The command of NVIDIA's compiler: what NVCC names, or else the one that is found.

    Raises:
        RuntimeError: there is none.
    """
    program, *words = commands.words("NVCC", "nvcc")
    if (program, *words) == ("nvcc",):
        return [tool("nvcc")]
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(f"NVCC: expected NVIDIA's compiler, got {program!r}, which is not on PATH")
    return [os.path.abspath(path), *words]


def tool(name: str) -> str:
    """As find_tool.

    Raises:
        RuntimeError: there is none.
    """
    path = find_tool(name)
    if path is None:
        raise RuntimeError(
            f"{name} is neither in CUDA_HOME/bin nor on PATH; target cuda needs NVIDIA's CUDA toolkit, 12.8 or later, "
            "or its packages from PyPI: pip install 'pa-compiler[compiler,cuda]'"
        )
    return path


def find_tool(name: str) -> str | None:
    """The path of one of the CUDA toolkit's programs: below CUDA_HOME, on PATH, or of NVIDIA's packages for Python.

    Where NVCC names a compiler, the programs beside it come first.
    """
    home = os.environ.get("CUDA_HOME")
    packages = importlib.util.find_spec("nvidia")
    given = commands.words("NVCC", "nvcc") if os.environ.get("NVCC", "").strip() else []
    folders = [Path(path).parent for path in map(shutil.which, given) if path]
    folders += [Path(home, "bin")] if home else []
    folders += [Path(folder) for folder in os.get_exec_path()]
    for place in (packages.submodule_search_locations or ()) if packages else ():
        folders += sorted(Path(place).glob("cu*/bin"))
    path = shutil.which(name, path=os.pathsep.join(str(folder) for folder in folders))
    return path and os.path.abspath(path)


def _run(command: list[str], made: Path) -> str:
    """Run one of the toolkit's programs, which must succeed and leave a file; return what it printed.

    In that file's folder and with names alone, since nvcc gives paths to a shell.
    """
    with commands.start(command, made.parent, {"TMPDIR": "."}) as process:
        return commands.finish(process, command[0], made)
