"""TensorIR: what is computed, for no target. One file per operation; the stages are written once for both pipelines."""

from tvm import IRModule

from pa_compiler.kernels import staged
from pa_compiler.kernels.fused_decode import fused_decode
from pa_compiler.kernels.merge_partials import merge_partials
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling

PIPELINES = {
    "fused": (fused_decode, merge_partials),
    "staged": (staged.qk_matmul, staged.softmax_prepare, staged.pv_matmul, staged.online_update, merge_partials),
}
"""The PrimFuncs of each pipeline, in the order in which the host calls them."""


def build(spec: PagedAttentionSpec, tiling: Tiling, pipeline: str) -> IRModule:
    """The PrimFuncs of a pipeline, unscheduled, under their own names."""
    return IRModule({kernel.__name__: kernel(spec, tiling) for kernel in PIPELINES[pipeline]})
