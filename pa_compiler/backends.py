"""The table of targets: which one a user means is asked here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pa_compiler.backend import Backend
from pa_compiler.cpu import backend as cpu
from pa_compiler.cuda import backend as cuda

TargetLike = str | Mapping[str, Any]

BACKENDS: dict[str, Backend] = {"llvm": cpu.BACKEND, "cuda": cuda.BACKEND}
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


def of(config: dict[str, Any]) -> Backend:
    """The backend of a normalized target."""
    return BACKENDS[config["kind"]]
