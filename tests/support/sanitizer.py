"""Libraries with AddressSanitizer in both of their halves, and a process that runs them.

g++ instruments the host's C++, with UndefinedBehaviorSanitizer too. The kernels come from LLVM inside of TVM, which has
no sanitizers: clang takes TVM's LLVM text, as it is after all of TVM's passes, and instruments each load and store of
it. So clang has to be as new as TVM's LLVM; the one in the package ziglang is. Its run-time library is g++'s.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import builds
import pytest

from pa_compiler import backends
from pa_compiler.backend import Extras
from pa_compiler.cpu import backend, build, target
from pa_compiler.cpu import tiles as tiling

GXX = """#!/bin/sh
exec g++ "$@" -O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1
"""
CLANG = "-m ziglang clang -O1 -fsanitize=address -fPIC -fno-addrsig -Wno-override-module -S -x ir".split()
EXIT_STATUS = 99
"""Of a process in which AddressSanitizer found something."""


def missing() -> str | None:
    """What of the tools is not there, as the reason of a skipped test."""
    if reason := missing_runtime():
        return reason
    if importlib.util.find_spec("ziglang") is None:
        return "libraries are not run under AddressSanitizer: its clang is not installed (pip install '.[soak]')"
    return None


def missing_runtime() -> str | None:
    """The same of what C and C++ need."""
    if shutil.which("g++") is None or _runtime() is None:
        return "libraries are not run under AddressSanitizer: g++ with its libasan is not installed"
    return None


def build_library(spec, pipeline: str, target_like, directory: Path) -> Path:
    """Compile a spec with AddressSanitizer in host and kernels; a library that load() takes."""
    directory.mkdir()
    gxx = directory / "g++"
    gxx.write_text(GXX)
    gxx.chmod(0o755)
    cpu = target.resolve(backends.normalize(target_like))
    compile_kernels = build.compile_kernels

    def instrumented(mod, cpu, scratch):
        compiled = compile_kernels(mod, cpu, scratch)
        return build.Kernels(llvm=compiled.llvm, asm=_instrument(compiled.llvm, scratch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(gxx))
        patch.setattr(build, "compile_kernels", instrumented)
        of_attend = tiling.choose_attend(spec, cpu, pipeline)
        extras = Extras(shared_prefix=not backend.without_prefix(spec, pipeline))
        builds.build_library(spec, cpu, tiling.choose(spec, cpu, pipeline), pipeline, directory, of_attend, extras)
    return directory / "pa.so"


def run(script: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a Python script with AddressSanitizer in place of malloc: NumPy's arrays end at bytes that it watches."""
    env = os.environ | {
        "LD_PRELOAD": str(_runtime()),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={EXIT_STATUS}",  # Python leaves much behind
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, str(script), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _instrument(llvm: str, scratch: Path) -> str:
    """LLVM's text to assembly in which each load and store is checked."""
    text, functions = re.subn(r"^(define .*?)( #\d+ )", r"\1 sanitize_address\2", llvm, flags=re.MULTILINE)
    assert functions == len(re.findall(r"^define ", llvm, re.MULTILINE)), "a function without attributes"
    source, asm = scratch / "instrumented.ll", scratch / "instrumented.s"
    source.write_text(text)
    subprocess.run([sys.executable, *CLANG, str(source), "-o", str(asm)], check=True)
    assert "__asan_report_load" in asm.read_text()
    return asm.read_text()


def _runtime() -> Path | None:
    """libasan, as g++ knows it."""
    path = Path(subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip())
    return path if path.is_absolute() else None
