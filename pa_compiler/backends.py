"""The table of targets: which one is meant is asked here, and nowhere else."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping
from typing import Any

from pa_compiler.backend import Backend

TargetLike = str | Mapping[str, Any]


@functools.cache
def _llvm() -> Backend:
    from pa_compiler.cpu import backend, explain, inside, target, tiles

    return Backend(
        normalize=target.normalize,
        check=tiles.check,
        fingerprint=target.fingerprint,
        machine=target.architecture,
        names_no_cpu=target.names_no_cpu,
        tools=dict,
        attends=backend.attends,
        without_prefix=backend.without_prefix,
        emit=backend.emit,
        emit_portable=backend.emit,
        build=backend.build,
        explain=explain.explain,
        inside=inside.inside,
        origins=backend.ORIGINS,
        takes_numpy=True,
    )


@functools.cache
def _cuda() -> Backend:
    from pa_compiler.cuda import backend, explain, inside, target, tiling

    return Backend(
        normalize=target.normalize,
        check=tiling.check,
        fingerprint=backend.fingerprint,
        machine=lambda config: platform.machine(),
        names_no_cpu=lambda config: False,
        tools=backend.tools,
        attends=backend.attends,
        without_prefix=lambda spec, pipeline: "target cuda",
        emit=backend.emit,
        emit_portable=backend.emit_portable,
        build=backend.build,
        explain=explain.explain,
        inside=inside.inside,
        origins=backend.ORIGINS,
        takes_numpy=False,
    )


BACKENDS: dict[str, Callable[[], Backend]] = {"llvm": _llvm, "cuda": _cuda}
"""By the kind of a TVM target dict. A target's room is imported when it is asked for."""


def normalize(target: TargetLike) -> dict[str, Any]:
    """Check a target as a user gives it, without importing TVM.

    Args:
        target: "llvm" for this machine's CPU, or {"kind": "llvm", "mtriple": ..., "mcpu": ..., "mattr": [...],
            "tuned": {...}}; "cuda", or {"kind": "cuda", "arch": ...}.

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
    return BACKENDS[target["kind"]]().normalize(target)


def named(name: str) -> TargetLike:
    """The target that one word means: a kind, the name of a GPU's architecture such as sm_90, or the name of a CPU."""
    if name in BACKENDS:
        return name
    return {"kind": "cuda", "arch": name} if name.startswith("sm_") else {"kind": "llvm", "mcpu": name}


def of(config: dict[str, Any]) -> Backend:
    """The backend of a normalized target."""
    return BACKENDS[config["kind"]]()
