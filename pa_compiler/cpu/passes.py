"""TVM's pipeline for CPUs with two passes of ours, one before its own and one after.

Register sums of 16 vectors: TVM has buffers of constant size below 1024 bytes on the stack, from where LLVM promotes
them, and allocates others. The sums of 16 vectors of 16 float32 numbers have just 1024.

Buffers as small as what is used of them: TVM's pass for it looks at every access of a kernel under all the conditions
around it, which was a third of what TVM took for a kernel of attend. Kernels say how large the buffers are that their
sblocks share, and schedules put others into the sblocks that use them. So only those are looked at, each alone in its
loops; and what would depend on the call stays as large as it was.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from pa_compiler import locations
from pa_compiler.statements import mapped, sblocks, with_loops

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.tirx import Buffer, For, PrimFunc, Stmt
    from tvm.transform import Pass, PassContext

_NAME = "pa_compiler"
_BYTES = 1024

COMPACTION = "s_tir.CompactBufferAllocation"
"""TVM's pass that makes buffers small, which is left out of its pipeline."""


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
        return (
            tvm.transform.Sequential([compaction(), lower]),
            lambda: tvm.transform.Sequential([keep_on_stack, finalize_host()]),
            finalize_device,
        )

    tirx.register_tir_pipeline(_NAME, registered)
    return _NAME


def compaction() -> Pass:
    """Of scheduled functions: puts each buffer where it is used, and makes those of innermost sblocks small."""
    import tvm
    from tvm import s_tir, tirx

    @tirx.transform.prim_func_pass(opt_level=0)
    def compact(function: PrimFunc, mod: IRModule, context: PassContext) -> PrimFunc:
        return function.with_body(mapped(function.body, lambda root: mapped(root, _compact)))

    located = [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
    ]
    return tvm.transform.Sequential([*located, compact])


def _compact(statement: Stmt, loops: tuple[For, ...] = ()) -> Stmt:
    """A statement inside of loops, with the buffers of innermost sblocks as small as what is used of them.

    An sblock with buffers is innermost if no other with buffers in it is the kernel's. Those that TVM puts around loops
    have no name.
    """
    from tvm import s_tir, tirx

    match statement:
        case s_tir.SBlockRealize(block=sblock) if sblock.alloc_buffers and not any(
            within.alloc_buffers and within.name_hint for within in sblocks(sblock.body)
        ):
            compacted = _compacted(statement, loops)
            if all(map(_size, compacted.block.alloc_buffers)):
                return compacted
        case tirx.For():
            loops = (*loops, statement)
    return mapped(statement, lambda each: _compact(each, loops))


def _compacted(statement: Stmt, loops: tuple[For, ...]) -> Stmt:
    """What TVM's pass makes of a statement inside of loops, of which alone it knows how far they go."""
    import tvm
    from tvm import s_tir, tirx

    alone = tvm.IRModule({_NAME: tirx.PrimFunc([], with_loops(loops, statement))})
    compacted = s_tir.transform.CompactBufferAllocation()(alone)[_NAME].body
    return functools.reduce(lambda outer, _: outer.body, loops, compacted)


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
