"""The GPU that code is made for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

DEFAULT_ARCH = "sm_90"
LEAST_CAPABILITY = 80
"""Of the oldest GPUs with the kernels' instructions: asynchronous copies, and bfloat16 on tensor cores."""

_KEYS = {"kind", "arch"}


@dataclasses.dataclass(frozen=True)
class CudaTarget:
    """A CUDA target.

    Attributes:
        arch: As nvcc names it, such as "sm_90". Later GPUs run its code too, unless a letter follows the number or
            they have less shared memory than a spec takes.
    """

    arch: str

    @property
    def config(self) -> dict[str, Any]:
        """The TVM target dict."""
        return {"kind": "cuda", "arch": self.arch}

    @property
    def capability(self) -> int:
        """The compute capability, times ten."""
        return int(re.sub(r"\D", "", self.arch))

    @property
    def portable(self) -> bool:
        """Whether later GPUs run its code too."""
        return self.arch[-1].isdigit()


def normalize(target: Mapping[str, Any]) -> dict[str, Any]:
    """Check a target dict of kind "cuda", and name its architecture.

    Raises:
        ValueError: it has other keys, or an architecture that the kernels do not run on.
    """
    if unknown := set(target) - _KEYS:
        raise ValueError(f"target: expected the keys {sorted(_KEYS)} for kind 'cuda', got also {sorted(unknown)}")
    arch = target.get("arch", DEFAULT_ARCH)
    if not isinstance(arch, str) or not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise ValueError(f"target: expected an arch such as 'sm_90', got {arch!r}")
    gpu = CudaTarget(arch)
    if gpu.capability < LEAST_CAPABILITY:
        raise ValueError(f"target: expected an arch from sm_{LEAST_CAPABILITY} on, got {arch!r}")
    return gpu.config
