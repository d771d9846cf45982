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
from pa_compiler.kernels.merge_partials import merge_partials
from pa_compiler.kernels.merge_parts import merge_float32_parts, merge_parts
from pa_compiler.key_ranges import decodes_by_attend
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import FEW_ROWS, Tiling

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

ATTEND = {
    "fused": {fused_attend.__name__: fused_attend},
    "staged": {f"attend_{kernel.__name__}": kernel for kernel in PIPELINES["staged"] if kernel != staged.online_update},
}
"""The PrimFuncs of each pipeline's attend, for sequences of several query tokens, by their names; with tiles of their
own, cpu.tiles.choose_attend. Those of the staged one are decode's with other tiles; what merges the partial results of
the fused one is decode's."""


def build(spec: PagedAttentionSpec, tiling: Tiling, pipeline: str) -> IRModule:
    """The PrimFuncs of a pipeline and of append_kv, unscheduled, under their own names.

    Of decode where attend's kernel is decode's too it is only what merges partial results.
    """
    of_decode = (merge_partials,) if decodes_by_attend(spec, pipeline) else PIPELINES[pipeline]
    decode = {kernel.__name__: kernel(spec, tiling) for kernel in of_decode}
    return IRModule(decode | {kernel.__name__: kernel(spec) for kernel in append(spec)})


def build_attend(spec: PagedAttentionSpec, tiling: Tiling, pipeline: str = "fused") -> IRModule:
    """The PrimFuncs of a pipeline's attend, unscheduled, under the names that ATTEND has for them.

    Where tiling has tiles for few rows, FEW_ROWS is fused_attend with these.
    """
    built = {name: kernel(spec, tiling) for name, kernel in ATTEND[pipeline].items()}
    if tiling.few is not None:
        built[FEW_ROWS] = fused_attend(spec, tiling.few)
    return IRModule({name: function.with_attr("global_symbol", name) for name, function in built.items()})


def build_merge(spec: PagedAttentionSpec, tiling: Tiling) -> IRModule:
    """The PrimFuncs of merge_states, unscheduled, under their own names: for each type that results may have, one."""
    merges = (merge_parts,) if spec.result_dtype == "float32" else (merge_parts, merge_float32_parts)
    return IRModule({kernel.__name__: kernel(spec, tiling) for kernel in merges})


def apart(mod: IRModule) -> tuple[IRModule, IRModule]:
    """The PrimFuncs of attend, and the others: their tiles are not the same."""
    of_attend = ATTEND["fused"].keys() | ATTEND["staged"].keys() | {FEW_ROWS}
    functions = {variable.name_hint: function for variable, function in mod.functions.items()}
    return (
        IRModule({name: function for name, function in functions.items() if name in of_attend}),
        IRModule({name: function for name, function in functions.items() if name not in of_attend}),
    )


def append(spec: PagedAttentionSpec) -> tuple[Callable[[PagedAttentionSpec], PrimFunc], ...]:
    """The PrimFuncs of append_kv, the same for every pipeline: where keys and values are rows alike, one for both."""
    alike = spec.kv_layout != "packed" and (spec.shared_kv or spec.result_dim == spec.head_dim)
    return (append_row,) if alike else (append_key, append_value)
