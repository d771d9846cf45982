"""TVM's pipeline with register sums of 16 vectors: small buffers on the stack, from where LLVM promotes them.

TVM has buffers of constant size below 1024 bytes on the stack, and allocates others. The sums of 16 vectors of 16
float32 numbers have just 1024.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from pa_compiler import locations

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.tirx import Buffer, PrimFunc, Stmt
    from tvm.transform import Pass, PassContext

_NAME = "pa_compiler"
_BYTES = 1024


@functools.cache
def pipeline() -> str:
    """The name under which TVM has the pipeline, for tvm.compile(tir_pipeline=...)."""
    import tvm
    from tvm import tirx

    @tirx.transform.prim_func_pass(opt_level=0)
    def keep_on_stack(function: PrimFunc, mod: IRModule, context: PassContext) -> PrimFunc:
        return function.with_body(locations.located(function.body, _keep))

    def registered() -> tuple[Pass, ...]:
        lower, finalize_host, finalize_device = tirx.get_tir_pipeline("s_tir")
        return lower, lambda: tvm.transform.Sequential([keep_on_stack, finalize_host()]), finalize_device

    tirx.register_tir_pipeline(_NAME, registered)
    return _NAME


def _keep(statement: Stmt) -> Stmt:
    """A buffer of _BYTES marked to stay on the stack; any other statement as it is."""
    from tvm import tirx

    match statement:
        case tirx.AllocBuffer(buffer=buffer) if _size(buffer) == _BYTES:
            return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.IntImm("bool", 1)})
        case _:
            return statement


def _size(buffer: Buffer) -> int:
    """Bytes of a buffer of constant size, else 0."""
    from tvm import DataType, tirx

    extents = [int(extent) for extent in buffer.shape if isinstance(extent, tirx.IntImm)]
    return math.prod(extents) * int(DataType(buffer.dtype).itemsize) if len(extents) == len(buffer.shape) else 0
