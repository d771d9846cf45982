"""How a spec is compiled for a target, and why, without running it: decisions, machine code, and the roofline."""

from __future__ import annotations

import dataclasses

from pa_compiler import backends, compiler, interrupts
from pa_compiler.cpu import target as _target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.assembly import Loop, inner_loops
from pa_compiler.cpu.tiles import CpuTiling
from pa_compiler.spec import PagedAttentionSpec


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the compiler decides for a spec, and the loops that come of it.

    Attributes:
        spec: What is compiled.
        pipeline: "fused" or "staged".
        target: The CPU.
        tiles: What tiling.choose chose.
        reason: Why it chose tiles.strategy, in one sentence.
        loops: All innermost loops of the assembly, in its order.
    """

    spec: PagedAttentionSpec
    pipeline: str
    target: _target.CpuTarget
    tiles: CpuTiling
    reason: str
    loops: list[Loop]


def explain(spec: PagedAttentionSpec, target: backends.TargetLike = "llvm", pipeline: str = "fused") -> Explanation:
    """Compile as far as to assembly, and read it. Arguments and errors as for pa_compiler.compile."""
    return interrupts.shielded(lambda: _explained(spec, target, pipeline))


def _explained(spec: PagedAttentionSpec, target: backends.TargetLike, pipeline: str) -> Explanation:
    asm = compiler.emit(spec, target, pipeline)["asm"]
    cpu = _target.resolve(backends.normalize(target))
    _, reason = tiling.choose_strategy(spec, cpu, pipeline)
    return Explanation(spec, pipeline, cpu, tiling.choose(spec, cpu, pipeline), reason, inner_loops(asm))
