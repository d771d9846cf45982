"""The table of targets: which one is meant is asked here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pa_compiler.backend import Backend
from pa_compiler.cpu import backend as cpu
from pa_compiler.cpu import explain as cpu_explain
from pa_compiler.cpu import target as cpu_target
from pa_compiler.cpu import tiles as cpu_tiling
from pa_compiler.cuda import backend as cuda
from pa_compiler.cuda import explain as cuda_explain
from pa_compiler.cuda import target as cuda_target
from pa_compiler.cuda import tiling as cuda_tiling

TargetLike = str | Mapping[str, Any]

BACKENDS = {
    "llvm": Backend(
        normalize=cpu_target.normalize,
        check=cpu_tiling.check,
        fingerprint=cpu_target.fingerprint,
        tools=dict,
        emit=cpu.emit,
        emit_portable=cpu.emit,
        build=cpu.build,
        explain=cpu_explain.explain,
        origins=cpu.ORIGINS,
        takes_numpy=True,
    ),
    "cuda": Backend(
        normalize=cuda_target.normalize,
        check=cuda_tiling.check,
        fingerprint=cuda.fingerprint,
        tools=cuda.tools,
        emit=cuda.emit,
        emit_portable=cuda.emit_portable,
        build=cuda.build,
        explain=cuda_explain.explain,
        origins=cuda.ORIGINS,
        takes_numpy=False,
    ),
}
"""By the kind of a TVM target dict."""


def normalize(target: TargetLike) -> dict[str, Any]:
    """Check a target as a user gives it, without importing TVM.

    Args:
        target: "llvm" for this machine's CPU, or {"kind": "llvm", "mcpu": ..., "mattr": [...]}; "cuda", or {"kind":
            "cuda", "arch": ...}.

    Returns:
        The target's config, whose "kind" is a key of BACKENDS.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if isinstance(target, str):
        if target not in BACKENDS:
            raise ValueError(f"target: expected 'llvm', 'cuda' or a dict of that kind, got {target!r}")
        target = {"kind": target}
    elif not isinstance(target, Mapping):
        raise TypeError(f"target: expected 'llvm', 'cuda' or a dict of that kind, got {type(target).__name__}")
    elif target.get("kind") not in BACKENDS:
        raise ValueError(f"target: expected kind 'llvm' or 'cuda', got {target.get('kind')!r}")
    return BACKENDS[target["kind"]].normalize(target)


def named(name: str) -> TargetLike:
    """The target that one word means: a kind, the name of a GPU's architecture such as sm_90, or the name of a CPU."""
    if name in BACKENDS:
        return name
    return {"kind": "cuda", "arch": name} if name.startswith("sm_") else {"kind": "llvm", "mcpu": name}


def of(config: dict[str, Any]) -> Backend:
    """The backend of a normalized target."""
    return BACKENDS[config["kind"]]
