"""TensorIR: what is computed, for no target. One file per operation; the stages are written once for both pipelines."""

from tvm import IRModule

from pa_compiler.kernels.fused_decode import fused_decode
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling

PIPELINES = {
    "fused": (fused_decode, ),
}


def build(spec: PagedAttentionSpec, tiling: Tiling, pipeline: str) -> IRModule:
    """The PrimFuncs of a pipeline, unscheduled, under their own names."""
    return IRModule({kernel.__name__: kernel(spec, tiling) for kernel in PIPELINES[pipeline]})
