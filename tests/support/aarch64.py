"""Programs for aarch64, compiled by Debian's compiler for it and run by qemu's emulation of a process."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from c_calls import read_result, write_case

CXX = "aarch64-linux-gnu-g++"
SYSTEM = "/usr/aarch64-linux-gnu"
"""What a program finds the C library in."""
TOOLS = (CXX, "qemu-aarch64-static")

needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason=f"there is no {' or no '.join(TOOLS)}: make aarch64-tools"
)


def run(program, *arguments, cpu="max", environment=None):
    """A finished process of a program on an emulated CPU."""
    command = ["qemu-aarch64-static", "-cpu", cpu, "-L", SYSTEM, str(program), *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False, timeout=300
    )


class Driver:
    """tests/c/driver.c with a bundle, which makes calls all at once, as a process takes its time to begin."""

    def __init__(self, bundle, source, folder) -> None:
        self.program, self.folder, self.waiting = folder / "driver", folder, []
        library = bundle / "lib"
        subprocess.run(
            [
                *("aarch64-linux-gnu-gcc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", source),
                *(f"-I{bundle / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}", "-lpa", "-pthread"),
                *("-o", self.program),
            ],
            check=True,
        )

    def add(self, call, spec_name, arrays, **how):
        """One more call; the number of its result."""
        number = len(self.waiting)
        path = self.folder / f"{number}.case"
        write_case(path, call, spec_name, arrays, **how)
        self.waiting.append((path, [arrays[name] for name in ("out", "lse") if arrays.get(name) is not None]))
        return number

    def results(self, *options, cpu="max", isa=""):
        """(status, message, arrays that were written) of each call that was added."""
        paths = [(path, path.with_suffix(".result")) for path, _ in self.waiting]
        words = [word for pair in paths for word in pair]
        done = run(self.program, *options, *words, cpu=cpu, environment={"PA_ISA": isa} if isa else None)
        assert (done.returncode, done.stderr) == (0, ""), done
        self.isa = done.stdout.strip()  # that was chosen
        return [read_result(result, written) for (_, result), (_, written) in zip(paths, self.waiting, strict=True)]
