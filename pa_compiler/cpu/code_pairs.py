"""Pairs of bfloat16 of codes of float8_e4m3fn, in lanes of 16 bits: half of the operations by way of float32.

The kernels say by way of float32 what a pair is (`paired` in kernels/elements.py), and on any other target, and for any
other type, that is compiled. Here such expressions in sums become calls of an operation of our own, which TVM
vectorizes. A code of 7 bits without its sign is moved to where bfloat16 has exponent and significand, and the biases'
difference is added. The 8 subnormal numbers are looked up, and NaN is put in.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pa_compiler.cpu.target import CpuTarget
from pa_compiler.tiles import Element

if TYPE_CHECKING:
    from tvm.ir import Expr

_OP = "pa_compiler.pair_of_float8_e4m3fn"
_TYPE = "float8_e4m3fn"
_ELEMENT = Element(_TYPE, terms=2)
_LANES = {8: 256, 16: 512}
"""Pairs of a vector -> bits of the vectors that there is a look-up of 16 bits for."""
_EITHER = 0xCA
"""Of a ternary logic: where the first has ones the second, and else the third. LLVM would make a shuffle of it, which
takes three operations of the one unit that shuffles."""
_SUBNORMAL = (0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60)
"""n / 512 as bfloat16, for n from 0 on."""


def takes(element: Element, target: CpuTarget) -> bool:
    """Whether there is a faster way for pairs of an element on a target."""
    return element.apart and element.dtype == _TYPE and {"avx512bw", "avx512vl"} <= target.features


def replaced(word: Expr) -> Expr:
    """A pair as a call of the operation, or the word as it is if it is no such pair."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.tirx import EQ, BitwiseAnd, BitwiseOr, RShift, Select

    from pa_compiler.kernels.elements import paired

    match word:
        case BitwiseOr(
            a=BitwiseAnd(a=RShift(a=Call(args=[Select(condition=EQ(a=BitwiseAnd(a=first)))]))),
            b=Call(args=[Select(condition=EQ(a=BitwiseAnd(a=second)))]),
        ) if tvm_ffi.structural_equal(word, paired(_ELEMENT, first, second)):
            _register()
            return Call(_OP, [first, second], ret_ty="int32")
    return word


@functools.cache
def _register() -> None:
    """Tell TVM of the operation: (code, code) -> the word of their numbers, lane by lane."""
    import tvm_ffi
    from tvm.ir import register_op_attr
    from tvm.tirx.op import register_intrin_lowering

    pure = 1
    tvm_ffi.get_global_func("ir.RegisterOp")(_OP, "the bfloat16 numbers of two codes as a word")
    register_op_attr(_OP, "TVectorizable", True)
    register_op_attr(_OP, "TCallEffectKind", pure)
    register_intrin_lowering(_OP, "llvm", f=_lower)


def _lower(call: Expr) -> Expr:
    """The function for whole vectors, what the kernels say for others."""
    from tvm.tirx import call_pure_extern

    from pa_compiler.kernels.elements import paired

    first, second = call.args
    lanes = call.ty.dtype.lanes
    if lanes not in _LANES:
        return paired(_ELEMENT, first, second)
    return call_pure_extern(f"int32x{lanes}", _name(lanes), first, second)


def definitions() -> str:
    """LLVM's text of the functions that are called, inlined."""
    return " ".join(_definition(lanes, bits) for lanes, bits in _LANES.items())


def _definition(lanes: int, bits: int) -> str:
    numbers, words, codes = f"<{2 * lanes} x i16>", f"<{lanes} x i32>", f"<{lanes} x i8>"
    look_up, merge = f"@llvm.x86.avx512.permvar.hi.{bits}", f"@llvm.x86.avx512.pternlog.d.{bits}"
    table = ", ".join(f"i16 {number}" for number in (_SUBNORMAL * 4)[: 2 * lanes])

    def all_of(number: int, type_: str = "i16", count: int = 2 * lanes) -> str:
        return f"<{', '.join([f'{type_} {number}'] * count)}>"

    low, high = all_of(65535, "i32", lanes), all_of(16, "i32", lanes)
    return (
        f"declare {numbers} {look_up}({numbers}, {numbers}) "
        f"declare {words} {merge}({words}, {words}, {words}, i32 immarg) "
        f"define {words} @{_name(lanes)}({codes} %a, {codes} %b) alwaysinline nounwind {{ "
        f"%x = sext {codes} %a to {words} %y = sext {codes} %b to {words} "
        f"%hi = shl {words} %y, {high} "
        f"%both = call {words} {merge}({words} {low}, {words} %x, {words} %hi, i32 {_EITHER}) "
        f"%w = bitcast {words} %both to {numbers} %m = and {numbers} %w, {all_of(127)} "
        f"%moved = shl {numbers} %m, {all_of(4)} %normal = add {numbers} %moved, {all_of(0x3C00)} "
        f"%small = icmp ult {numbers} %m, {all_of(8)} "
        f"%sub = call {numbers} {look_up}({numbers} <{table}>, {numbers} %m) "
        f"%r = select <{2 * lanes} x i1> %small, {numbers} %sub, {numbers} %normal "
        f"%isnan = icmp eq {numbers} %m, {all_of(127)} "
        f"%held = select <{2 * lanes} x i1> %isnan, {numbers} {all_of(0x7FC0)}, {numbers} %r "
        f"%sign = and {numbers} %w, {all_of(-32768)} %signed = or {numbers} %held, %sign "
        f"%word = bitcast {numbers} %signed to {words} ret {words} %word }}"
    )


def _name(lanes: int) -> str:
    return f"pa_pair_of_float8_e4m3fn_{lanes}"
