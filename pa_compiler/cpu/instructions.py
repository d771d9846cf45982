"""Instructions that LLVM does not find by itself: dot products of pairs of bfloat16, and of integers of 16 bits.

They are vdpbf16ps or bfdot, and vpdpwssd or vpmaddwd. The kernels say what they compute in plain operations
(kernels/elements.py), and on any other target those are compiled. Here sums of that form become calls of an operation
of our own, which TVM vectorizes and lowers to LLVM's intrinsic (products.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pa_compiler.cpu.products import INTEGERS, PAIRS, Product, definitions
from pa_compiler.cpu.sblocks import replace_body, sblocks
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.tiles import LANES, Tiling

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Expr
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import SBlockRV

_LANES = "pa_compiler.lanes"
_WIDEN = "pa_compiler.widen"


def select(mod: IRModule, target: CpuTarget, tiling: Tiling) -> IRModule:
    """The scheduled module with the instruction where a dot product of pairs is added to a sum, if the target has it.

    The tiling is decode's: where it multiplies no pairs, attend does not.

    The module given may be changed: use it no more.
    """
    products = [product for product in (PAIRS, INTEGERS) if product.dots(target)]
    if not products or tiling.keys.terms == 1:
        return mod
    from tvm.s_tir import Schedule

    _register()
    sch = Schedule(mod)
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        kept = [sblock for sblock in sblocks(sch) if _keep_lanes(sch, sblock)]
        of_words = {lanes for sblock in kept for lanes in _vectorized(sch, sblock)}
        for product in products:
            sums = [sblock for sblock in sblocks(sch) if _replace_sum(sch, sblock, product)]
            if sums:
                lanes = {lanes for sblock in sums for lanes in _vectorized(sch, sblock)} | product.dots(target).keys()
                text = definitions(lanes, of_words, target, product)
                sch.annotate(sch.get_loops(sums[0])[0], "pragma_import_llvm", text)
        for sblock in sblocks(sch):
            _widen_copy(sch, sblock)
    return sch.mod


def _vectorized(sch: Schedule, sblock: SBlockRV) -> set[int]:
    """The extents of vectorized loops around an sblock."""
    from tvm.tirx import ForKind

    loops = [sch.get(loop) for loop in sch.get_loops(sblock)]
    return {int(loop.extent) for loop in loops if loop.kind == ForKind.VECTORIZED}


def _replace_sum(sch: Schedule, sblock: SBlockRV, product: Product) -> bool:
    """Let an sblock that adds a dot product of pairs call the operation; whether it is one."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.tirx import Add, BufferStore, LShift, Mul, RShift

    old = sch.get(sblock)
    match old.body:
        case (
            BufferStore(
                value=Add(a=total, b=Add(a=Mul(a=Call(args=[LShift(a=a)]), b=Call(args=[LShift(a=b)]))) as added)
            )
            | BufferStore(value=Add(a=total, b=Add(a=Mul(a=RShift(a=LShift(a=a)), b=RShift(a=LShift(a=b)))) as added))
        ) if tvm_ffi.structural_equal(added, product.of_words(a, b)):
            pass
        case _:
            return False
    call = Call(product.op, [total, _widened_codes(a), _widened_codes(b)], ret_ty=total.ty)
    store = BufferStore(old.body.buffer, call, old.body.indices)
    replace_body(sch, sch.get_sref(sblock), store)
    return True


def _widened_codes(word: Expr) -> Expr:
    """The word of two codes by the operation that makes it of both; others as they are."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.tirx import BitwiseAnd, BitwiseOr, Cast, LShift

    from pa_compiler.kernels.elements import pair_integers

    match word:
        case BitwiseOr(a=BitwiseAnd(a=Cast(value=first) as low), b=LShift(a=Cast(value=second) as high)) if (
            tvm_ffi.structural_equal(word, pair_integers(low, high))
        ):
            return Call(_WIDEN, [first, second], ret_ty="int32")
        case _:
            return word


def _widen_copy(sch: Schedule, sblock: SBlockRV) -> None:
    """Let an sblock that stores the words of two codes make them by the operation."""
    from tvm.tirx import BufferStore

    body = sch.get(sblock).body
    if isinstance(body, BufferStore) and not (word := _widened_codes(body.value)).same_as(body.value):
        replace_body(sch, sch.get_sref(sblock), BufferStore(body.buffer, word, body.indices))


def _keep_lanes(sch: Schedule, sblock: SBlockRV) -> bool:
    """Let an sblock that reads words for their lanes call the operation that says of which type; whether it is one."""
    from tvm.ir import Call
    from tvm.tirx import BufferStore

    old = sch.get(sblock)
    if LANES not in old.annotations:
        return False
    call = Call(_LANES, [old.body.value], ret_ty="int32")
    replace_body(sch, sch.get_sref(sblock), BufferStore(old.body.buffer, call, old.body.indices))
    return True


@functools.cache
def _register() -> None:
    """Tell TVM of the operations, which are lane by lane."""
    import tvm_ffi
    from tvm.ir import register_op_attr
    from tvm.tirx.op import register_intrin_lowering

    pure = 1
    operations: list[tuple[str, str, Callable[[Any], Any]]] = [
        *((each.op, "sum + product", functools.partial(_lower, each)) for each in (PAIRS, INTEGERS)),
        (_LANES, "words", _lower_lanes),
        (_WIDEN, "the word of two codes", _lower_widen),
    ]
    for name, what, lower in operations:
        tvm_ffi.get_global_func("ir.RegisterOp")(name, what)
        register_op_attr(name, "TVectorizable", True)
        register_op_attr(name, "TCallEffectKind", pure)
        register_intrin_lowering(name, "llvm", f=lower)


def _lower_widen(call: Expr) -> Expr:
    """Codes that lie side by side, in one piece; others one by one."""
    from tvm.ir import TensorLoad
    from tvm.sym import Analyzer
    from tvm.tirx import BufferLoad, Cast, Ramp, call_pure_extern

    from pa_compiler.kernels.elements import pair_integers

    first, second = call.args
    match first, second:
        case TensorLoad(indices=(Ramp(base=at, stride=step),)), TensorLoad(indices=(Ramp(base=after),)) if (
            Analyzer().can_prove(after - at == 1) and Analyzer().can_prove(step == 2)
        ):
            lanes = call.ty.dtype.lanes
            codes = BufferLoad(first.source, [Ramp(at, 1, 2 * lanes)])
            return call_pure_extern(f"int32x{lanes}", f"pa_widen_{lanes}", codes)
        case _:
            lanes = call.ty.dtype.lanes
            wide = "int32" if lanes == 1 else f"int32x{lanes}"
            return pair_integers(Cast(wide, first), Cast(wide, second))


def _lower_lanes(call: Expr) -> Expr:
    """Words of vectors that are loaded as they are, but for LLVM, which takes lanes only of what is bfloat16."""
    from tvm.tirx import call_pure_extern

    (words,) = call.args
    lanes = words.ty.dtype.lanes
    return words if lanes == 1 else call_pure_extern(f"int32x{lanes}", f"pa_lanes_{lanes}", words)


def _lower(product: Product, call: Expr) -> Expr:
    """The instruction for whole vectors, plain operations for single lanes."""
    from tvm.tirx import Broadcast, call_pure_extern

    total, a, b = call.args
    lanes = total.ty.dtype.lanes
    if isinstance(a, Broadcast):  # the one number for all lanes comes last, as bfdot has it
        a, b = b, a
    if lanes == 1:
        return total + product.of_words(a, b)
    kind = "float32" if product is PAIRS else "int32"
    return call_pure_extern(f"{kind}x{lanes}", product.of_lanes(lanes), total, a, b)
