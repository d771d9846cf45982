"""TensorIR: what is computed. One file per operation; the stages are written once for both pipelines.

Of a target the stages know the sizes of a Tiling, no more. Rows, tiles of tokens, elements and states are values, each
with a file: rows.py, tokens.py, elements.py, state.py.
"""

from collections.abc import Callable

from tvm import IRModule
from tvm.tirx import PrimFunc

from pa_compiler.kernels import staged
from pa_compiler.kernels.append_kv import append_key, append_row, append_value
from pa_compiler.kernels.fused_attend import fused_attend
from pa_compiler.kernels.fused_decode import fused_decode
from pa_compiler.kernels.merge_attend import merge_attend
from pa_compiler.kernels.merge_partials import merge_partials
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling

PIPELINES = {
    "fused": (fused_decode, merge_partials),
    "staged": (
        staged.qk_matmul,
        staged.softmax_prepare,
        staged.pv_matmul,
        staged.online_update,
        staged.normalize,
    ),
}
"""The PrimFuncs of each pipeline's decode, in the order in which the host calls them."""

ATTEND = (fused_attend, merge_attend)
"""The PrimFuncs of attend, for sequences of several query tokens; with tiles of their own, cpu.tiles.choose_attend."""


def build(spec: PagedAttentionSpec, tiling: Tiling, pipeline: str, of_attend: Tiling | None = None) -> IRModule:
    """The PrimFuncs of a pipeline, of attend where it has tiles, and of append_kv, unscheduled, by their own names."""
    kernels = {kernel.__name__: kernel(spec, tiling) for kernel in PIPELINES[pipeline]}
    if of_attend is not None:
        kernels |= {kernel.__name__: kernel(spec, of_attend) for kernel in ATTEND}
    return IRModule(kernels | {kernel.__name__: kernel(spec) for kernel in append(spec)})


def append(spec: PagedAttentionSpec) -> tuple[Callable[[PagedAttentionSpec], PrimFunc], ...]:
    """The PrimFuncs of append_kv, the same for every pipeline: where keys and values are rows alike, one for both."""
    alike = spec.kv_layout != "packed" and (spec.shared_kv or spec.result_dim == spec.head_dim)
    return (append_row,) if alike else (append_key, append_value)
