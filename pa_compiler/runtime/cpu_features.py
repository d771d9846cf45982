"""What the CPU of this machine has: asked when a library is loaded, and when one is compiled for this machine."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_X86: Mapping[str, str] = (
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
"""Of x86: LLVM's names, and Linux's in /proc/cpuinfo."""

_SECOND = 64
"""What is added to the number of a bit of AT_HWCAP2, of 64 bits as AT_HWCAP is."""

_ARM: Mapping[str, int] = {
    "fp-armv8": 0,
    "neon": 1,
    "fullfp16": 10,
    "rdm": 12,
    "jsconv": 13,
    "complxnum": 14,
    "dotprod": 20,
    "sve": 22,
    "fp16fml": 23,
    "flagm": 27,
    "sve2": _SECOND + 1,
    "altnzcv": _SECOND + 7,
    "fptoint": _SECOND + 8,
    "i8mm": _SECOND + 13,
    "bf16": _SECOND + 14,
    "sme": _SECOND + 23,
    "cssc": _SECOND + 34,
    "mops": _SECOND + 43,
}
"""Of AArch64: LLVM's names, and bits of the auxiliary vector (asm/hwcap.h)."""

INSTRUCTION_SETS: Mapping[str, str | int] = {**_X86, **_ARM}
"""The instruction sets from which LLVM takes instructions unasked: LLVM's names, and what Linux says of them.

What else LLVM calls a feature is tuning, is used by intrinsics alone, or is of atomic operations, which no kernel has.
"""

_AT_HWCAP, _AT_HWCAP2 = 16, 26
"""Keys of the auxiliary vector (linux/auxvec.h)."""


def missing_features(features: Iterable[str]) -> list[str]:
    """Those instruction sets (LLVM's names) that programs may not use on this machine, sorted.

    The system's word counts, rather than the CPU's: a feature whose registers the system does not save, or that a
    virtual machine hides, is not there to use. A kernel older than a feature does not name it, and it then counts as
    missing. On x86-64 it is in /proc/cpuinfo, on AArch64 in the auxiliary vector of the process.
    """
    present = _present()
    return sorted(name for name in features if INSTRUCTION_SETS.get(name, name) not in present)


def _present() -> set[str | int]:
    """What Linux says of this CPU, as in INSTRUCTION_SETS."""
    if platform.machine() == "aarch64":
        words = hwcaps()
        return {bit for bit in _ARM.values() if words >> bit & 1}
    return {*cpuinfo().get("flags", "").split()}


def hwcaps() -> int:
    """AT_HWCAP and, above its 64 bits, AT_HWCAP2 of this process."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(_AT_HWCAP)) | int(getauxval(_AT_HWCAP2)) << _SECOND


def name() -> str:
    """Of this CPU, for files: its maker, family, model and stepping, as Linux numbers them."""
    info = cpuinfo()
    fields = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(info[each] for each in fields if each in info)) or "cpu"


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
