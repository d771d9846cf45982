"""Instructions that LLVM does not find by itself: the dot product of pairs of AVX512_BF16, vdpbf16ps.

The kernels say what it computes in plain operations (kernels/pairs.py), and on any other target those are compiled.
Here sums of that form become calls of an operation of our own, which TVM vectorizes and lowers to LLVM's intrinsic.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pa_compiler.target import CpuTarget

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Expr
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import SBlockRV

_OP = "pa_compiler.dot_pairs"
_BITS = {4: 128, 8: 256, 16: 512}
"""Lanes of float32 -> bits of the vectors that there is an instruction for."""


def select(mod: IRModule, target: CpuTarget) -> IRModule:
    """The scheduled module with vdpbf16ps wherever a dot product of pairs is added to a sum, if the target has it.

    The module given may be changed: use it no more. The instruction adds the two products one after the other, each
    with one rounding, and takes subnormal numbers for 0.
    """
    if not target.dot_pairs:
        return mod
    from tvm.s_tir import Schedule

    _register()
    sch = Schedule(mod)
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        sums = [sblock for sblock in _sblocks(sch) if _replace_sum(sch, sblock)]
        if sums:
            sch.annotate(sch.get_loops(sums[0])[0], "pragma_import_llvm", _definitions())
    return sch.mod


def _sblocks(sch: Schedule) -> list[SBlockRV]:
    """All sblocks of the function that the schedule works on."""
    found = [sch.get_sblock("root")]
    for sblock in found:
        found += sch.get_child_blocks(sblock)
    return found


def _replace_sum(sch: Schedule, sblock: SBlockRV) -> bool:
    """Let an sblock that adds a dot product of pairs call the operation; whether it is one."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.s_tir import SBlock
    from tvm.tirx import Add, BufferStore, LShift, Mul

    from pa_compiler.kernels.pairs import dot_pairs

    old = sch.get(sblock)
    match old.body:
        case BufferStore(
            value=Add(a=total, b=Add(a=Mul(a=Call(args=[LShift(a=a)]), b=Call(args=[LShift(a=b)]))) as product)
        ) if tvm_ffi.structural_equal(product, dot_pairs(a, b)):
            pass
        case _:
            return False
    call = Call(_OP, [total, a, b], ret_ty="float32")
    store = BufferStore(old.body.buffer, call, old.body.indices)
    new = SBlock(
        old.iter_vars, old.reads, old.writes, old.name_hint, store, old.init, old.alloc_buffers, old.match_buffers,
        old.annotations,
    )  # fmt: skip
    sch.state.replace(sch.get_sref(sblock), new, {old: new})
    return True


@functools.cache
def _register() -> None:
    """Tell TVM of the operation: (sum, a, b) -> sum + dot_pairs(a, b), lane by lane."""
    import tvm_ffi
    from tvm.ir import register_op_attr
    from tvm.tirx.op import register_intrin_lowering

    pure = 1
    tvm_ffi.get_global_func("ir.RegisterOp")(_OP, "sum + dot_pairs(a, b)")
    register_op_attr(_OP, "TVectorizable", True)
    register_op_attr(_OP, "TCallEffectKind", pure)
    register_intrin_lowering(_OP, "llvm", f=_lower)


def _lower(call: Expr) -> Expr:
    """The instruction for whole vectors, plain operations for single lanes and the like."""
    from tvm.tirx import call_pure_extern

    from pa_compiler.kernels.pairs import dot_pairs

    total, a, b = call.args
    lanes = total.ty.dtype.lanes
    if lanes not in _BITS:
        return total + dot_pairs(a, b)
    return call_pure_extern(f"float32x{lanes}", _name(lanes), total, a, b)


def _definitions() -> str:
    """LLVM's text of the functions that are called, inlined: TVM passes no bfloat16 vectors to an intrinsic."""
    return " ".join(
        f"declare <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}"
        f"(<{lanes} x float>, <{2 * lanes} x bfloat>, <{2 * lanes} x bfloat>) "
        f"define <{lanes} x float> @{_name(lanes)}(<{lanes} x float> %sum, <{lanes} x i32> %a, <{lanes} x i32> %b) "
        "alwaysinline nounwind { "
        f"%x = bitcast <{lanes} x i32> %a to <{2 * lanes} x bfloat> "
        f"%y = bitcast <{lanes} x i32> %b to <{2 * lanes} x bfloat> "
        f"%r = call <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}"
        f"(<{lanes} x float> %sum, <{2 * lanes} x bfloat> %x, <{2 * lanes} x bfloat> %y) "
        f"ret <{lanes} x float> %r }}"
        for lanes, bits in _BITS.items()
    )


def _name(lanes: int) -> str:
    return f"pa_dot_pairs_{lanes}"
