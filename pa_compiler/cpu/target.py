"""The CPU that code is made for: its TVM target, its features, and the vector registers that they imply."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from typing import Any

from pa_compiler.runtime import cpu_features, versions

_KEYS = {"kind", "mcpu", "mattr"}


@dataclasses.dataclass(frozen=True)
class CpuTarget:
    """A resolved LLVM CPU target.

    Attributes:
        config: The TVM target dict as canonical JSON text.
        features: LLVM's names of all features that code may use.
    """

    config: str
    features: frozenset[str]

    @property
    def vector_lanes(self) -> int:
        """float32 lanes of the widest vector register."""
        if "avx512f" in self.features:
            return 16
        return 8 if "avx" in self.features else 4

    @property
    def vector_registers(self) -> int:
        """Vector registers that there are."""
        return 32 if self.vector_lanes == 16 else 16

    @property
    def vector_sums(self) -> int:
        """Vector registers that a register tile of any shape may use for its sums.

        AVX-512 has 32 registers, the others 16; the rest hold the operands. With 16 sums keys in NHD were read up to
        1.12 times as fast from a cache on Zen 4, and packed ones from memory took 1.25 times as long.
        """
        return 15 if self.vector_lanes == 16 else 14

    @property
    def dot_pairs(self) -> bool:
        """Whether there is vdpbf16ps, the dot product of pairs of bfloat16, for vectors of every size."""
        return {"avx512bf16", "avx512vl"} <= self.features

    @property
    def tile_registers(self) -> bool:
        """Whether there is AMX with tdpbf16ps, the product of two matrices of pairs of bfloat16."""
        return self.dot_pairs and {"amx-tile", "amx-bf16"} <= self.features


def normalize(target: Mapping[str, Any]) -> dict[str, Any]:
    """Check a target dict of kind "llvm". The kind alone stands for this machine's CPU with all its features.

    Raises:
        TypeError, ValueError: it has other keys, or other values than TVM takes.
    """
    if set(target) == {"kind"}:
        return {"kind": "llvm"}
    if unknown := set(target) - _KEYS:
        raise ValueError(f"target: expected the keys {sorted(_KEYS)}, got also {sorted(unknown)}")
    if not isinstance(target.get("mcpu", "x86-64"), str):
        raise TypeError(f"target: expected mcpu to be a string, got {target['mcpu']!r}")
    mattr = target.get("mattr", [])
    if isinstance(mattr, str) or not all(isinstance(a, str) and re.fullmatch(r"[+-][A-Za-z0-9._-]+", a) for a in mattr):
        raise ValueError(f"target: expected mattr to be a list of '+feature' or '-feature', got {mattr!r}")
    normalized = {"kind": "llvm", "mcpu": target.get("mcpu", _baseline())}
    if mattr:
        normalized["mattr"] = list(mattr)
    return normalized


def fingerprint(normalized: dict[str, Any]) -> dict[str, Any]:
    """What tells two targets apart in a cache key: the dict and, without an mcpu, this CPU with all its features."""
    if "mcpu" in normalized:
        return {**normalized, "machine": platform.machine()}
    identity = cpu_features.cpuinfo()
    keep = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    return {**normalized, "machine": platform.machine(), **{k: identity[k] for k in keep if k in identity}}


def instruction_sets(target: CpuTarget) -> tuple[str, ...]:
    """The instruction sets among a target's features, sorted: what a CPU must have to run its code."""
    return tuple(sorted(target.features & cpu_features.INSTRUCTION_SETS.keys()))


def resolve(normalized: dict[str, Any]) -> CpuTarget:
    """Ask LLVM what a normalized target is. Imports TVM.

    Raises:
        ValueError: LLVM does not know the mcpu.
        ImportError, RuntimeError: there is no TVM, or one of another version.
    """
    versions.check_compiler()
    import tvm_ffi
    from tvm.target import Target, codegen

    if "mcpu" in normalized:
        known = list(codegen.llvm_get_cpu_archlist(Target({"kind": "llvm"})))
        if normalized["mcpu"] not in known:
            raise ValueError(f"target: expected an mcpu that LLVM knows, such as x86-64-v3, got {normalized['mcpu']!r}")
        config = normalized
    else:
        host = tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
        mattr = sorted(f"{'+' if present else '-'}{name}" for name, present in host.items())
        config = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "mattr": mattr}
    features = set(codegen.llvm_get_cpu_features(Target(config)))
    for attribute in config.get("mattr", []):
        (features.add if attribute[0] == "+" else features.discard)(attribute[1:])
    return CpuTarget(json.dumps(config, sort_keys=True), frozenset(str(name) for name in features))


def architecture(normalized: Mapping[str, Any]) -> str:
    """The architecture that a normalized target is of, such as "x86_64"."""
    return str(normalized.get("mtriple", platform.machine())).partition("-")[0]


def _baseline() -> str:
    return {"x86_64": "x86-64", "AMD64": "x86-64"}.get(platform.machine(), "generic")
