"""The CPU that code is made for: its TVM target, its features, and the vector registers that they imply."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pa_compiler.cpu import architectures, choices
from pa_compiler.cpu.architectures import ARCHITECTURES
from pa_compiler.runtime import cpu_features, versions

_KEYS = {"kind", "mtriple", "mcpu", "mattr", "tuned"}


class Vectors(NamedTuple):
    """The vector registers of an instruction set.

    Attributes:
        lanes: float32 lanes of the widest one.
        registers: Those that there are.
        sums: Those that a register tile of any shape may use for its sums; the rest hold the operands.
        by_element: Whether a product takes a lane of a register as the one number for all lanes of the other operand.
    """

    lanes: int
    registers: int
    sums: int
    by_element: bool = False


_VECTORS = {
    "avx512f": Vectors(16, 32, 15),
    "avx": Vectors(8, 16, 14),
    "neon": Vectors(4, 32, 24, by_element=True),
}
"""By LLVM's names of instruction sets, the widest first.

With 16 sums of AVX-512, keys in NHD were read up to 1.12 times as fast from a cache on Zen 4, and packed ones from
memory took 1.25 times as long. NEON's are not measured: four units of four cycles, as in Neoverse V2, need 16 at least.
"""

_DOTS = {
    frozenset({"avx512bf16", "avx512vl"}): {
        lanes: f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}" for lanes in (4, 8, 16)
    },
    frozenset({"neon", "bf16"}): {4: "llvm.aarch64.neon.bfdot.v4f32.v8bf16"},
}
"""By instruction sets, LLVM's intrinsics of the dot product of pairs of bfloat16 by the float32 lanes of their vectors.

vdpbf16ps adds the two products one after the other, each with one rounding. bfdot adds their sum, and rounds to the odd
one of two neighbours. Both take subnormal numbers for 0.
"""

_BLOCKS = {frozenset({"neon", "bf16"}): "llvm.aarch64.neon.bfmmla"}
"""By instruction sets, LLVM's intrinsic of the product of two blocks of 2 rows of 2 pairs of bfloat16.

bfmmla multiplies each row of one by each row of the other, and adds the pairs of a row as two instructions bfdot would.
"""


_VPDPWSSD = {lanes: f"llvm.x86.avx512.vpdpwssd.{32 * lanes}" for lanes in (4, 8, 16)}
VPMADDWD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}

_INTEGER_DOTS = {
    frozenset({"avx512vnni", "avx512vl"}): _VPDPWSSD,
    frozenset({"avx512bw", "avx512vl"}): VPMADDWD,
    frozenset({"avxvnni"}): {lanes: _VPDPWSSD[lanes] for lanes in (4, 8)},
    frozenset({"avx2"}): {lanes: VPMADDWD[lanes] for lanes in (4, 8)},
}
"""The same of pairs of integers of 16 bits, in int32, the fastest first. vpdpwssd adds to a sum, vpmaddwd does not."""

_VPDPBUSD = {lanes: f"llvm.x86.avx512.vpdpbusd.{32 * lanes}" for lanes in (4, 8, 16)}
_VPMADDUBSW = {
    4: "llvm.x86.ssse3.pmadd.ub.sw.128",
    8: "llvm.x86.avx2.pmadd.ub.sw",
    16: "llvm.x86.avx512.pmaddubs.w.512",
}

_BYTE_DOTS = {
    frozenset({"avx512vnni", "avx512vl"}): _VPDPBUSD,
    frozenset({"avx512bw", "avx512vl"}): _VPMADDUBSW,
    frozenset({"avxvnni"}): {lanes: _VPDPBUSD[lanes] for lanes in (4, 8)},
    frozenset({"avx2"}): {lanes: _VPMADDUBSW[lanes] for lanes in (4, 8)},
}
"""The same of four bytes, unsigned ones by signed ones. vpdpbusd adds to a sum. vpmaddubsw leaves sums of two products,
in 16 bits, of which vpmaddwd makes those of four."""

_WHOLE_VPDPWSSD = "+fast-dpwssd"
"""LLVM's word for leaving vpdpwssd whole. Without it LLVM makes vpmaddwd and an addition of it, for sums that wait for
one another; kernels have enough sums, and a product would take two of the slots that it shares with all others."""


@dataclasses.dataclass(frozen=True)
class CpuTarget:
    """A resolved LLVM CPU target.

    Attributes:
        config: The target dict as canonical JSON text: TVM's, and what is tuned.
        features: LLVM's names of all features that code may use.
    """

    config: str
    features: frozenset[str]

    @property
    def machine(self) -> str:
        """The name of its architecture, as platform.machine() has it."""
        return architecture(json.loads(self.config))

    @property
    def of_tvm(self) -> dict[str, Any]:
        """The TVM target dict, with what LLVM is told about the code that it is given."""
        config = {key: value for key, value in json.loads(self.config).items() if key != "tuned"}
        if self.integer_dots and self.integer_dots.items() <= _VPDPWSSD.items():
            config["mattr"] = [*config.get("mattr", []), _WHOLE_VPDPWSSD]
        return config

    @property
    def tuned(self) -> dict[str, dict[str, Any]]:
        """Fields of machines.Machine that the target says itself, by kernels."""
        return dict(json.loads(self.config).get("tuned", {}))

    @property
    def _vectors(self) -> Vectors:
        found = (vectors for name, vectors in _VECTORS.items() if name in self.features)
        return next(found, Vectors(4, 16, 14))

    @property
    def vector_lanes(self) -> int:
        """Vectors.lanes."""
        return self._vectors.lanes

    @property
    def vector_registers(self) -> int:
        """Vectors.registers."""
        return self._vectors.registers

    @property
    def vector_sums(self) -> int:
        """Vectors.sums."""
        return self._vectors.sums

    @property
    def by_element(self) -> bool:
        """Vectors.by_element."""
        return self._vectors.by_element

    @property
    def dots(self) -> Mapping[int, str]:
        """LLVM's intrinsics of the dot product of pairs of bfloat16, by the float32 lanes of their vectors; or none."""
        return next((intrinsics for sets, intrinsics in _DOTS.items() if sets <= self.features), {})

    @property
    def dot_pairs(self) -> bool:
        """Whether there is a dot product of pairs of bfloat16 for vectors of every size: vdpbf16ps or bfdot."""
        return bool(self.dots)

    @property
    def dot_blocks(self) -> str:
        """LLVM's intrinsic of the product of two blocks of pairs of bfloat16 in vectors: bfmmla; "" without one."""
        return next((intrinsic for sets, intrinsic in _BLOCKS.items() if sets <= self.features), "")

    @property
    def integer_dots(self) -> Mapping[int, str]:
        """LLVM's intrinsics of the dot product of pairs of integers of 16 bits, by the int32 lanes of their vectors."""
        return next((intrinsics for sets, intrinsics in _INTEGER_DOTS.items() if sets <= self.features), {})

    @property
    def byte_dots(self) -> Mapping[int, str]:
        """LLVM's intrinsics of the dot product of four bytes by the int32 lanes of their vectors."""
        return next((intrinsics for sets, intrinsics in _BYTE_DOTS.items() if sets <= self.features), {})

    @property
    def tile_registers(self) -> bool:
        """Whether there is AMX with tdpbf16ps, the product of two matrices of pairs of bfloat16."""
        return self.dot_pairs and {"amx-tile", "amx-bf16"} <= self.features


def normalize(target: Mapping[str, Any]) -> dict[str, Any]:
    """Check a target dict of kind "llvm". The kind alone stands for this machine's CPU with all its features.

    Raises:
        TypeError, ValueError: it has other keys, or other values than TVM takes.
    """
    said = {"tuned": choices.checked(target["tuned"])} if "tuned" in target else {}
    if not set(target) - {"kind", "tuned"}:
        return {"kind": "llvm"} | said
    if unknown := set(target) - _KEYS:
        raise ValueError(f"target: expected the keys {sorted(_KEYS)}, got also {sorted(unknown)}")
    for name in ("mtriple", "mcpu"):
        if not isinstance(target.get(name, ""), str):
            raise TypeError(f"target: expected {name} to be a string, got {target[name]!r}")
    mattr = target.get("mattr", [])
    if isinstance(mattr, str) or not all(isinstance(a, str) and re.fullmatch(r"[+-][A-Za-z0-9._-]+", a) for a in mattr):
        raise ValueError(f"target: expected mattr to be a list of '+feature' or '-feature', got {mattr!r}")
    if "mtriple" in target:
        machine = architectures.of_triple(target["mtriple"])
    else:
        machine = architectures.of_cpu(target.get("mcpu", ""))
    known = ARCHITECTURES.get(machine)
    normalized = {"kind": "llvm", "mcpu": target.get("mcpu", known.baseline if known else "generic")}
    if known is not None and machine != platform.machine():
        normalized["mtriple"] = known.triple
    if mattr:
        normalized["mattr"] = list(mattr)
    return normalized | said


def names_no_cpu(normalized: Mapping[str, Any]) -> bool:
    """Whether a normalized target is this machine's CPU and says no more, so that a record of it is taken up."""
    return set(normalized) == {"kind"}


def architecture(normalized: Mapping[str, Any]) -> str:
    """The architecture that a normalized target is of, such as "x86_64": its triple's, or this machine's."""
    return architectures.of_triple(normalized["mtriple"]) if "mtriple" in normalized else platform.machine()


def fingerprint(normalized: dict[str, Any]) -> dict[str, Any]:
    """What tells two targets apart in a cache key: the dict and, without an mcpu, this CPU with all its features."""
    if "mcpu" in normalized:
        return {**normalized, "machine": architecture(normalized)}
    identity = cpu_features.cpuinfo()
    keep = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    return {**normalized, "machine": platform.machine(), **{k: identity[k] for k in keep if k in identity}}


def instruction_sets(target: CpuTarget) -> tuple[str, ...]:
    """The instruction sets among a target's features, sorted: what a CPU must have to run its code."""
    return tuple(sorted(target.features & cpu_features.INSTRUCTION_SETS.keys()))


def resolve(normalized: dict[str, Any]) -> CpuTarget:
    """Ask LLVM what a normalized target is. Imports TVM.

    Raises:
        ValueError: LLVM does not know the mcpu, or one of mattr, or makes no code for what is left of the CPU.
        ImportError, RuntimeError: there is no TVM, or one of another version.
    """
    versions.check_compiler()
    import tvm_ffi
    from tvm.target import Target, codegen

    made_for = ARCHITECTURES.get(architecture(normalized))
    if "mcpu" in normalized:
        of_triple = {key: value for key, value in normalized.items() if key in ("kind", "mtriple")}
        known = list(codegen.llvm_get_cpu_archlist(Target(of_triple)))
        if normalized["mcpu"] not in known:
            example = made_for.example if made_for else "generic"
            raise ValueError(f"target: expected an mcpu that LLVM knows, such as {example}, got {normalized['mcpu']!r}")
        config = {key: value for key, value in normalized.items() if key != "tuned"}
        _check_attributes(of_triple | {"mcpu": normalized["mcpu"]}, config.get("mattr", []))
    else:
        host = tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
        mattr = sorted(f"{'+' if present else '-'}{name}" for name, present in host.items())
        config = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "mattr": mattr}
    if made_for is not None and made_for.without:
        config["mattr"] = _without(made_for.without, config.get("mattr", []), normalized.get("mattr", []))
    features = {str(name) for name in codegen.llvm_get_cpu_features(Target(config))}
    if "tuned" in normalized:
        config["tuned"] = normalized["tuned"]
    for attribute in config.get("mattr", []):
        (features.add if attribute[0] == "+" else features.discard)(attribute[1:])
    architectures.check_features(architecture(normalized), str(config["mcpu"]), features)
    return CpuTarget(json.dumps(config, sort_keys=True), frozenset(features))


def _check_attributes(of_tvm: dict[str, Any], attributes: list[str]) -> None:
    """Refuse features that LLVM does not know and would leave out: of those it knows it says that they are added."""
    from tvm.target import Target, codegen

    for attribute in attributes:
        name = attribute[1:]
        added = codegen.llvm_get_cpu_features(Target(of_tvm | {"mattr": [f"+{name}"]}))
        if name not in map(str, added):
            raise ValueError(f"target: expected mattr to name features that LLVM knows, got {attribute!r}")


def _without(names: tuple[str, ...], mattr: list[str], wanted: list[str]) -> list[str]:
    """The attributes of a target without features, and all that begin with their names, but for those wanted."""
    left = [each for each in mattr if each in wanted or not each[1:].startswith(names)]
    return left + [f"-{name}" for name in names if f"+{name}" not in wanted]
