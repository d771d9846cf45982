"""What the CPU of this machine has: asked when a library is loaded, and when one is compiled for this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

INSTRUCTION_SETS = (
    {name: name for name in ("cmov", "sse", "sse2", "ssse3", "sse4a", "popcnt", "movbe", "tbm", "gfni")}
    | {"sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sahf": "lahf_lm", "prfchw": "3dnowprefetch"}
    | {"lzcnt": "abm", "bmi": "bmi1", "bmi2": "bmi2"}
    | dict.fromkeys(("egpr", "ndd", "nf", "ccmp", "ppx", "push2pop2", "zu", "cf"), "apx")
    | {name: name for name in ("avx", "avx2", "f16c", "fma", "fma4", "xop")}
    | {"avxvnni": "avx_vnni", "avxifma": "avx_ifma", "avxneconvert": "avx_ne_convert"}
    | {f"avxvnni{name}": f"avx_vnni_{name}" for name in ("int8", "int16")}
    | {f"avx512{name}": f"avx512{name}" for name in ("f", "cd", "bw", "dq", "vl", "ifma", "vbmi")}
    | {f"avx512{name}": f"avx512_{name}" for name in ("vbmi2", "vnni", "bitalg", "vpopcntdq", "bf16", "fp16")}
    | {f"amx-{name}": f"amx_{name}" for name in ("tile", "int8", "bf16", "fp16", "complex")}
)
"""The instruction sets of x86 from which LLVM takes instructions unasked: LLVM's names, and Linux's in /proc/cpuinfo.

What else LLVM calls a feature is tuning, or is used by intrinsics alone.
"""


def missing_features(features: Iterable[str]) -> list[str]:
    """Those instruction sets (LLVM's names) that programs may not use on this machine, sorted.

    The system's word in /proc/cpuinfo counts, rather than the CPU's in CPUID: a feature whose registers the system
    does not save, or that a virtual machine hides, is not there to use. A kernel older than a feature does not name
    it, and it then counts as missing.
    """
    present = set(cpuinfo().get("flags", "").split())
    return sorted(name for name in features if INSTRUCTION_SETS.get(name, name) not in present)


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first CPU.

    Raises:
        RuntimeError: it says nothing.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise RuntimeError(f"/proc/cpuinfo: expected what this CPU has, got: {error}; is /proc mounted?") from error
    lines = text.split("\n\n", 1)[0].splitlines()
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in fields}
