"""spec + tiles + emitted kernels -> the C++ of the CUDA target's host, through templates/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pa_compiler import host
from pa_compiler.cuda.build import Parameter, parameters
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.cuda.tiles import CHUNK_BYTES, CudaTiling
from pa_compiler.cuda.tiling import WAVES
from pa_compiler.interface import CUDA_ENTRY_POINTS, with_inputs
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling

if TYPE_CHECKING:
    from pa_compiler.cuda.kernels.launches import Launch

_MAX_BLOCKS = 1 << 30
"""Thread blocks of a launch, at most, before those of extra work items; a GPU takes twice as many."""

_TYPES = {"int": "int32_t", "int64_t": "int64_t", "float": "float"}
"""What the host passes for a parameter that is no pointer."""

APPEND_KERNELS = ("cuda_check_slots", "cuda_append_kv")
MERGE_KERNELS = ("cuda_merge_parts", "cuda_merge_float32_parts")
ATTEND_KERNELS = ("cuda_check_queries", "cuda_attend", "cuda_merge_attend")


class _Kernel(NamedTuple):
    """A kernel as the templates see it: blocks is a C++ expression of its parameters' names."""

    name: str
    parameters: list[Parameter]
    blocks: str
    threads: int
    shared_bytes: int


def render_fused(
    spec: PagedAttentionSpec, tiling: CudaTiling, target: CudaTarget, source: str, launches: Mapping[str, Launch]
) -> str:
    """The text of host.cc for the fused pipeline.

    Args:
        spec: What is compiled.
        tiling: What cuda_tiling.choose chose.
        target: The GPU.
        source: The emitted CUDA C, which says in which order kernels take their parameters.
        launches: How each kernel is launched.
    """
    return _render(
        spec,
        "fused",
        target,
        _kernels(source, launches),
        head_tiles=tiling.head_tiles(spec),
        range_tokens=tiling.range_tokens,
        most_ranges=tiling.most_ranges,
        max_batch=_MAX_BLOCKS // spec.num_heads,
        waves=WAVES,
    )


def render_staged(
    spec: PagedAttentionSpec, tiling: Tiling, target: CudaTarget, source: str, launches: Mapping[str, Launch]
) -> str:
    """The same for the staged pipeline, of what cuda_tiling.staged gave."""
    return _render(spec, "staged", target, _kernels(source, launches), tiling=tiling, max_batch=_MAX_BLOCKS)


def _kernels(source: str, launches: Mapping[str, Launch]) -> dict[str, _Kernel]:
    return {
        name: _Kernel(name, [_passed(parameter) for parameter in parameters(source, name)], *launch)
        for name, launch in launches.items()
    }


def _render(
    spec: PagedAttentionSpec, pipeline: str, target: CudaTarget, kernels: dict[str, _Kernel], **values: object
) -> str:
    append = [kernel for name, kernel in kernels.items() if name in APPEND_KERNELS]
    attend = [kernel for name, kernel in kernels.items() if name in ATTEND_KERNELS]
    merge = [kernel for name, kernel in kernels.items() if name in MERGE_KERNELS]
    decode = [kernel for kernel in kernels.values() if kernel not in append + attend + merge]
    arrays = {f"input_{each.name}": f"Address(args.input_{each.name})" for each in spec.inputs}
    arrays |= {each.name: f"args.{each.name}" for each in spec.constants}
    return host.render_template(
        "cuda/host.cc.j2",
        spec,
        host.describe(spec, pipeline),
        pipeline=pipeline,
        arch=target.arch,
        capability=target.capability,
        exact_arch=not target.portable,
        kernels=kernels,
        attends=bool(attend),
        decode_inputs=with_inputs(CUDA_ENTRY_POINTS["decode"], spec),
        attend_inputs=with_inputs(CUDA_ENTRY_POINTS["attend"], spec),
        function_arrays=arrays,
        decode_parameters=_together(decode),
        attend_kernel_parameters=_together(attend),
        append_parameters=_together(append),
        merge_parameters=_together(merge),
        cache_alignment=CHUNK_BYTES,
        **values,
    )


def _passed(parameter: Parameter) -> Parameter:
    """A parameter with the type in which the host passes it."""
    if parameter.type.endswith("*"):
        return Parameter(parameter.name, "CUdeviceptr")
    return Parameter(parameter.name, host.STRIDES.get(parameter.name, _TYPES[parameter.type]))


def _together(kernels: Iterable[_Kernel]) -> list[Parameter]:
    """The parameters of some kernels, each once: those of one name have one value."""
    return sorted({parameter for kernel in kernels for parameter in kernel.parameters}, key=lambda each: each.name)
