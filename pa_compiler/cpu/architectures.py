"""The architectures that kernels are compiled for: what LLVM and this project call them and their CPUs."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple


class Architecture(NamedTuple):
    """An architecture of CPUs.

    Attributes:
        triple: LLVM's name of it with Linux.
        baseline: LLVM's name of a CPU with what all of them have.
        example: The name of a CPU, for messages.
        cpus: LLVM's names of its CPUs, those that tell it from others.
        needs: Features that its calling convention passes numbers by, so that no code is made without them.
        without: Features that code does without, though a CPU has them: of these kernels, whose vectors have the sizes
            that tiles are chosen for, SVE and SME make nothing shorter.
    """

    triple: str
    baseline: str
    example: str
    cpus: re.Pattern[str]
    needs: tuple[str, ...]
    without: tuple[str, ...] = ()


ARCHITECTURES: Mapping[str, Architecture] = {
    "x86_64": Architecture(
        "x86_64-linux-gnu",
        "x86-64",
        "x86-64-v3",
        re.compile(
            r"x86-64.*|.*(lake|mont|rapids|forest|bridge|ridge|well)(-.*)?|(znver|btver|bdver|amdfam|k8|core).*"
            r"|barcelona|opteron.*|athlon.*|nehalem|westmere|skx|knl|knm|atom"
        ),
        needs=("64bit", "sse", "sse2"),
    ),
    "aarch64": Architecture(
        "aarch64-linux-gnu",
        "generic",
        "neoverse-n1",
        re.compile(
            r"(neoverse|cortex|apple|thunderx|ampere|exynos|fujitsu|c1)\W?.*|a64fx|grace|gb10|olympus|tsv110|carmel"
            r"|falkor|kryo|oryon-1|saphira|cyclone"
        ),
        needs=("fp-armv8", "neon"),
        without=("sve", "sme"),
    ),
}
"""By the name that a machine gives itself (platform.machine())."""


def of_triple(triple: str) -> str:
    """The name of a triple's architecture.

    Raises:
        ValueError: it is none of them, or not with Linux and the GNU libraries.
    """
    machine, *others = triple.split("-")
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if machine not in ARCHITECTURES or others[-2:] != ["linux", "gnu"]:
        triples = " or ".join(repr(each.triple) for each in ARCHITECTURES.values())
        raise ValueError(f"target: expected mtriple {triples}, got {triple!r}")
    return machine


def check_features(machine: str, mcpu: str, features: Collection[str]) -> None:
    """Refuse a CPU, or what is left of it, that LLVM makes no code for that others can call.

    Raises:
        ValueError: it lacks what the architecture needs, or computes without registers of floating-point numbers.
    """
    known = ARCHITECTURES.get(machine)
    lacks = [name for name in known.needs if name not in features] if known else []
    if lacks or "soft-float" in features:
        needs = ", ".join(known.needs) if known else "registers of floating-point numbers"
        got = f"without {', '.join(lacks)}" if lacks else "with soft-float"
        raise ValueError(f"target: expected a CPU of {machine} with {needs}, without soft-float; got {mcpu!r} {got}")


def of_cpu(mcpu: str) -> str:
    """The name of the architecture whose CPUs have such names; this machine's where both might, or neither."""
    fitting = [name for name, each in ARCHITECTURES.items() if each.cpus.fullmatch(mcpu)]
    return fitting[0] if len(fitting) == 1 else platform.machine()
