"""What a page shows of a module for a GPU: its tiles, and what the machine code of its kernels consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pa_compiler.backend import InnerLoop, Inside, Limits, Option
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import gpus
from pa_compiler.cuda.explain import COLUMNS, LEGEND, decisions
from pa_compiler.cuda.strategies import MAX_ROW_TILE, choose_strategy, weights_leave_range
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.cuda.tiles import MMA_HEADS, MMA_TOKENS, WARP
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.words import counted


def inside(
    spec: PagedAttentionSpec,
    target: Mapping[str, Any],
    features: Sequence[str],
    pipeline: str,
    sources: Mapping[str, str],
    limits: Limits,
) -> Inside:
    """What a library is made of, from what its manifest says and its SASS, where a disassembler made that.

    Raises:
        ValueError: limits are of a CPU, or name no GPU of the target's architecture.
    """
    chip = CudaTarget(target["arch"])
    if limits.flops is not None or limits.bandwidth is not None:
        raise ValueError("flops: expected a module for a CPU with limits of a core, got one for a GPU")
    if limits.gpu is not None and gpus.GPUS[limits.gpu].arch != chip.arch:
        raise ValueError(f"gpu: expected one of {chip.arch}, got {limits.gpu}")
    kernels = [_kernel(*each) for each in _kernels(sources.get("sass", ""))]
    decode = next((kernel for kernel in kernels if kernel.function == "cuda_decode"), None)
    strategy, reason = choose_strategy(spec)
    facts = [("strategy", f"{strategy}. {reason}")]
    if decode is not None:
        facts = decisions(spec, chip, _registers(decode.code), limits.gpu)
    legend = {name: LEGEND.get(name, name) for name in COLUMNS}
    return Inside(facts, options(spec), kernels, legend, "", None)


def options(spec: PagedAttentionSpec) -> list[Option]:
    """The two strategies, and what instructions each would have for a token."""
    chosen, reason = choose_strategy(spec)
    dims, rows = spec.head_dim + spec.result_dim, min(spec.group, MAX_ROW_TILE)
    products = -(-rows // MMA_HEADS) * dims / 16 / MMA_TOKENS
    costs = {
        "tensor_cores": f"products of fragments of a warp for a token of a kv head: {products:g}, of whose columns "
        f"{rows} of {-(-rows // MMA_HEADS) * MMA_HEADS} are heads",
        "fma": f"multiply-adds of a warp for a token of a kv head: {rows * dims / WARP:g}",
    }
    if spec.dtype == "float32" or weights_leave_range(spec):
        costs["tensor_cores"] = ""
    return [Option(name, name == chosen, reason, cost) for name, cost in costs.items()]


def _kernels(sass: str) -> list[tuple[str, int, str]]:
    """Of each kernel its name, the line that its section begins at, and its text; none where nothing disassembles."""
    found = list(re.finditer(r"^\s*\.section\s+\.text\.(\w+)_kernel\b.*$", sass, flags=re.MULTILINE))
    ends = [*(each.start() for each in found[1:]), len(sass)][: len(found)]
    return [
        (each[1], sass.count("\n", 0, each.start()) + 1, sass[each.start() : end])
        for each, end in zip(found, ends, strict=True)
    ]


def _kernel(name: str, line: int, text: str) -> InnerLoop:
    counts = cuda_build.instructions(text)
    mix = {
        kind: sum(number for opcode, number in counts.items() if re.fullmatch(pattern, opcode))
        for kind, pattern in COLUMNS.items()
    }
    code = tuple(text.splitlines())
    spills = sum(number for opcode, number in counts.items() if opcode.startswith(("STL", "LDL")))
    said = counted(_registers(code), "register") + (f", {counted(spills, 'access')} to local memory" if spills else "")
    return InnerLoop(name, (line,), mix, counts.total(), None, "", said, code)


def _registers(code: Sequence[str]) -> int:
    """Registers of a thread: as many as the highest number that is named."""
    return 1 + max((int(number) for line in code for number in re.findall(r"\bR(\d+)\b", line)), default=-1)
