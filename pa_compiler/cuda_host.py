"""spec + tiles + emitted kernels -> the C++ of the CUDA target's host, through templates/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pa_compiler import host
from pa_compiler.cuda_build import Parameter, parameters
from pa_compiler.cuda_target import CudaTarget
from pa_compiler.cuda_tiling import CHUNK_BYTES, CudaTiling
from pa_compiler.spec import PagedAttentionSpec

if TYPE_CHECKING:
    from pa_compiler.kernels.cuda import Launch

WAVES = 2
"""Thread blocks that long sequences are cut for, by how many a GPU runs at once: in one, all wait for the slowest."""

_MAX_BLOCKS = 1 << 30
"""Thread blocks of a launch, at most, before those of extra work items; a GPU takes twice as many."""

_TYPES = {"int": "int32_t", "int64_t": "int64_t", "float": "float"}
"""What the host passes for a parameter that is no pointer."""

DECODE_KERNELS = ("cuda_check", "cuda_decode", "cuda_merge")
APPEND_KERNELS = ("cuda_check_slots", "cuda_append_kv")


class _Kernel(NamedTuple):
    """A kernel as the templates see it: blocks is a C++ expression of its parameters' names."""

    name: str
    parameters: list[Parameter]
    blocks: str
    threads: int
    shared_bytes: int


def render(
    spec: PagedAttentionSpec, tiling: CudaTiling, target: CudaTarget, source: str, launches: Mapping[str, Launch]
) -> str:
    """The text of host.cc.

    Args:
        spec: What is compiled.
        tiling: What cuda_tiling.choose chose.
        target: The GPU.
        source: The emitted CUDA C, which says in which order kernels take their parameters.
        launches: How each kernel is launched.
    """
    kernels = {
        name: _Kernel(name, [_passed(parameter) for parameter in parameters(source, name)], *launch)
        for name, launch in launches.items()
    }
    return host.render_template(
        "cuda_host.cc.j2",
        spec,
        host.describe(spec, "fused"),
        arch=target.arch,
        capability=target.capability,
        exact_arch=not target.portable,
        kernels=kernels,
        decode_parameters=_together(kernels[name] for name in DECODE_KERNELS),
        append_parameters=_together(kernels[name] for name in APPEND_KERNELS),
        head_tiles=tiling.head_tiles(spec),
        max_batch=_MAX_BLOCKS // spec.num_heads,
        waves=WAVES,
        word_elements=1,
        cache_alignment=CHUNK_BYTES,
    )


def _passed(parameter: Parameter) -> Parameter:
    """A parameter with the type in which the host passes it."""
    if parameter.type.endswith("*"):
        return Parameter(parameter.name, "CUdeviceptr")
    return Parameter(parameter.name, _TYPES[parameter.type])


def _together(kernels: Iterable[_Kernel]) -> list[Parameter]:
    """The parameters of some kernels, each once: those of one name have one value."""
    return sorted({parameter for kernel in kernels for parameter in kernel.parameters}, key=lambda each: each.name)
