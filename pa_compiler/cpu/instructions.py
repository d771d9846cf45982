"""Instructions that LLVM does not find by itself: the dot product of pairs of bfloat16, vdpbf16ps or bfdot.

The kernels say what it computes in plain operations (kernels/elements.py), and on any other target those are compiled.
Here sums of that form become calls of an operation of our own, which TVM vectorizes and lowers to LLVM's intrinsic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pa_compiler.cpu.sblocks import replace_body, sblocks
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.tiles import LANES, Tiling

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Expr
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import SBlockRV

_OP = "pa_compiler.dot_pairs"
_LANES = "pa_compiler.lanes"


def select(mod: IRModule, target: CpuTarget, tiling: Tiling) -> IRModule:
    """The scheduled module with the instruction where a dot product of pairs is added to a sum, if the target has it.

    The tiling is decode's or attend's: both multiply pairs, or none does.

    The module given may be changed: use it no more.
    """
    if not target.dot_pairs or tiling.keys.terms == 1:
        return mod
    from tvm.s_tir import Schedule

    _register()
    sch = Schedule(mod)
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        sums = [sblock for sblock in sblocks(sch) if _replace_sum(sch, sblock)]
        kept = [sblock for sblock in sblocks(sch) if _keep_lanes(sch, sblock)]
        if sums:
            lanes, of_words = ({lanes for each in of for lanes in _vectorized(sch, each)} for of in (sums, kept))
            definitions = _definitions(lanes | target.dots.keys(), of_words, target)
            sch.annotate(sch.get_loops(sums[0])[0], "pragma_import_llvm", definitions)
    return sch.mod


def _vectorized(sch: Schedule, sblock: SBlockRV) -> set[int]:
    """The extents of vectorized loops around an sblock."""
    from tvm.tirx import ForKind

    loops = [sch.get(loop) for loop in sch.get_loops(sblock)]
    return {int(loop.extent) for loop in loops if loop.kind == ForKind.VECTORIZED}


def _replace_sum(sch: Schedule, sblock: SBlockRV) -> bool:
    """Let an sblock that adds a dot product of pairs call the operation; whether it is one."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.tirx import Add, BufferStore, LShift, Mul

    from pa_compiler.kernels.elements import dot_pairs

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
    replace_body(sch, sch.get_sref(sblock), store)
    return True


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
    """Tell TVM of the operation: (sum, a, b) -> sum + dot_pairs(a, b), lane by lane."""
    import tvm_ffi
    from tvm.ir import register_op_attr
    from tvm.tirx.op import register_intrin_lowering

    pure = 1
    for name, what, lower in ((_OP, "sum + dot_pairs(a, b)", _lower), (_LANES, "words", _lower_lanes)):
        tvm_ffi.get_global_func("ir.RegisterOp")(name, what)
        register_op_attr(name, "TVectorizable", True)
        register_op_attr(name, "TCallEffectKind", pure)
        register_intrin_lowering(name, "llvm", f=lower)


def _lower_lanes(call: Expr) -> Expr:
    """Words of vectors that are loaded as they are, but for LLVM, which takes lanes only of what is bfloat16."""
    from tvm.tirx import call_pure_extern

    (words,) = call.args
    lanes = words.ty.dtype.lanes
    return words if lanes == 1 else call_pure_extern(f"int32x{lanes}", f"pa_lanes_{lanes}", words)


def _lower(call: Expr) -> Expr:
    """The instruction for whole vectors, plain operations for single lanes."""
    from tvm.tirx import call_pure_extern

    from pa_compiler.kernels.elements import dot_pairs

    total, a, b = call.args
    lanes = total.ty.dtype.lanes
    if lanes == 1:
        return total + dot_pairs(a, b)
    return call_pure_extern(f"float32x{lanes}", _name(lanes), total, a, b)


def _definitions(lanes: Iterable[int], of_words: Iterable[int], target: CpuTarget) -> str:
    """LLVM's text of the functions that are called, inlined: TVM passes no bfloat16 vectors to an intrinsic.

    lanes are those of sums, and of_words those of vectors that are loaded for their lanes.
    """
    dots = target.dots
    parts = {each: math.gcd(each, max(dots)) for each in sorted(set(lanes) - dots.keys())}
    texts = [_instructions(dots)]
    texts += [_widened(part, min(dots)) for part in sorted(set(parts.values()) - dots.keys())]
    texts += [_in_parts(each, part) for each, part in parts.items() if each != part]
    texts += [_blocks(target.dot_blocks)] if target.dot_blocks else []
    return " ".join(texts + [_lanes(each) for each in sorted(of_words)])


def _blocks(intrinsic: str) -> str:
    """The function of schedules/intrinsics/block_products.py."""
    from pa_compiler.schedules.intrinsics.block_products import DOT_BLOCKS, LANES

    floats, words, pairs = f"<{LANES} x float>", f"<{LANES} x i32>", f"<{2 * LANES} x bfloat>"
    return (
        f"declare {floats} @{intrinsic}({floats}, {pairs}, {pairs}) "
        f"define {floats} @{DOT_BLOCKS}({floats} %sum, {words} %a, {words} %b) alwaysinline nounwind {{ "
        f"%x = bitcast {words} %a to {pairs} %y = bitcast {words} %b to {pairs} "
        f"%r = call {floats} @{intrinsic}({floats} %sum, {pairs} %x, {pairs} %y) ret {floats} %r }}"
    )


def _lanes(lanes: int) -> str:
    """The function of words that are loaded for their lanes: a fence, which is no instruction, for a type's sake."""
    words, pairs = f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    fence = f"@llvm.arithmetic.fence.v{2 * lanes}bf16"
    return (
        f"declare {pairs} {fence}({pairs}) "
        f"define {words} @pa_lanes_{lanes}({words} %a) alwaysinline nounwind {{ "
        f"%x = bitcast {words} %a to {pairs} %y = call {pairs} {fence}({pairs} %x) "
        f"%r = bitcast {pairs} %y to {words} ret {words} %r }}"
    )


def _instructions(dots: Mapping[int, str]) -> str:
    return " ".join(
        f"declare <{lanes} x float> @{intrinsic}"
        f"(<{lanes} x float>, <{2 * lanes} x bfloat>, <{2 * lanes} x bfloat>) "
        f"define <{lanes} x float> @{_name(lanes)}(<{lanes} x float> %sum, <{lanes} x i32> %a, <{lanes} x i32> %b) "
        "alwaysinline nounwind { "
        f"%x = bitcast <{lanes} x i32> %a to <{2 * lanes} x bfloat> "
        f"%y = bitcast <{lanes} x i32> %b to <{2 * lanes} x bfloat> "
        f"%r = call <{lanes} x float> @{intrinsic}"
        f"(<{lanes} x float> %sum, <{2 * lanes} x bfloat> %x, <{2 * lanes} x bfloat> %y) "
        f"ret <{lanes} x float> %r }}"
        for lanes, intrinsic in dots.items()
    )


def _widened(lanes: int, whole: int) -> str:
    """The function for vectors that are shorter than any that there is an instruction for."""
    of = {"f32": "float", "i32": "i32"}
    insert = {name: f"@llvm.vector.insert.v{whole}{name}.v{lanes}{name}" for name in of}
    extract = f"@llvm.vector.extract.v{lanes}f32.v{whole}f32"
    short, long = ({name: f"<{count} x {kind}>" for name, kind in of.items()} for count in (lanes, whole))
    declared = f"declare {short['f32']} {extract}({long['f32']}, i64) " + "".join(
        f"declare {long[name]} {insert[name]}({long[name]}, {short[name]}, i64) " for name in of
    )
    steps = "".join(
        f"%{name}0 = call {long[kind]} {insert[kind]}({long[kind]} zeroinitializer, {short[kind]} %{name}, i64 0) "
        for name, kind in (("sum", "f32"), ("a", "i32"), ("b", "i32"))
    )
    return (
        f"{declared}define {short['f32']} @{_name(lanes)}({short['f32']} %sum, {short['i32']} %a, {short['i32']} %b) "
        f"alwaysinline nounwind {{ {steps}"
        f"%r = call {long['f32']} @{_name(whole)}({long['f32']} %sum0, {long['i32']} %a0, {long['i32']} %b0) "
        f"%s = call {short['f32']} {extract}({long['f32']} %r, i64 0) ret {short['f32']} %s }}"
    )


def _in_parts(lanes: int, part: int) -> str:
    """The function for longer vectors, which takes them apart into parts that there is an instruction for."""
    floats, words = f"<{lanes} x float>", f"<{lanes} x i32>"
    of_floats, of_words = f"<{part} x float>", f"<{part} x i32>"
    insert = f"@llvm.vector.insert.v{lanes}f32.v{part}f32"
    extract = {name: f"@llvm.vector.extract.v{part}{name}.v{lanes}{name}" for name in ("f32", "i32")}
    steps, result = "", "poison"
    for at in range(0, lanes, part):
        steps += (
            f"%s{at} = call {of_floats} {extract['f32']}({floats} %sum, i64 {at}) "
            f"%a{at} = call {of_words} {extract['i32']}({words} %a, i64 {at}) "
            f"%b{at} = call {of_words} {extract['i32']}({words} %b, i64 {at}) "
            f"%p{at} = call {of_floats} @{_name(part)}({of_floats} %s{at}, {of_words} %a{at}, {of_words} %b{at}) "
            f"%r{at} = call {floats} {insert}({floats} {result}, {of_floats} %p{at}, i64 {at}) "
        )
        result = f"%r{at}"
    return (
        f"declare {of_floats} {extract['f32']}({floats}, i64) declare {of_words} {extract['i32']}({words}, i64) "
        f"declare {floats} {insert}({floats}, {of_floats}, i64) "
        f"define {floats} @{_name(lanes)}({floats} %sum, {words} %a, {words} %b) alwaysinline nounwind "
        f"{{ {steps}ret {floats} {result} }}"
    )


def _name(lanes: int) -> str:
    return f"pa_dot_pairs_{lanes}"
