"""The machine that is measured: its name, its last-level cache, and which CPUs to pin threads to."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def cpu_name() -> str:
    """The model name that the kernel reports."""
    return _cpuinfo("model name")


def results(what: str) -> Path:
    """The file that keeps what was measured on such a core, by LLVM's name of it."""
    from tvm.target import codegen

    return Path(__file__).with_name("results") / f"{codegen.llvm_get_system_cpu()}-{what}.json"


def cpu_flags() -> frozenset[str]:
    """The instruction-set extensions that the kernel reports, such as "avx2"."""
    return frozenset(_cpuinfo("flags").split())


def cores() -> list[int]:
    """One CPU of each core that this process may use, last core first: interrupts tend to go to the first."""
    allowed = os.sched_getaffinity(0)
    first_of_core: dict[str, int] = {}
    for cpu in sorted(allowed):
        siblings = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        first_of_core.setdefault(siblings, cpu)
    return sorted(first_of_core.values(), reverse=True)


def _cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    raise RuntimeError(f"/proc/cpuinfo: expected a line {field!r}, found none")
