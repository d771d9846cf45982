"""Instructions that LLVM does not find by itself: dot products of pairs of bfloat16, vdpbf16ps or bfdot, and of integers
of 16 bits, vpdpwssd or vpmaddwd.

The kernels say what it computes in plain operations (kernels/elements.py), and on any other target those are compiled.
Here sums of that form become calls of an operation of our own, which TVM vectorizes and lowers to LLVM's intrinsic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

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


class _Product(NamedTuple):
    """A sum of products for which there are instructions.

    Attributes:
        op: The name of the operation, (sum, a, b) -> sum + product.
        name: The name of its functions in LLVM, without the lanes.
        number, sum: LLVM's types of the numbers of a pair, and of the sum.
        short: The sum's in the names of intrinsics.
    """

    op: str
    name: str
    number: str
    sum: str
    short: str

    @property
    def of_words(self) -> Callable[[Expr, Expr], Expr]:
        """What the operation adds to a sum, in plain operations."""
        from pa_compiler.kernels.elements import dot_integers, dot_pairs

        return dot_pairs if self is _PAIRS else dot_integers

    def dots(self, target: CpuTarget) -> Mapping[int, str]:
        """The target's intrinsics by the lanes of their vectors; or none."""
        return target.dots if self is _PAIRS else target.integer_dots

    def of_lanes(self, lanes: int) -> str:
        """The function of vectors of so many lanes."""
        return f"{self.name}_{lanes}"


_PAIRS = _Product("pa_compiler.dot_pairs", "pa_dot_pairs", "bfloat", "float", "f32")
_INTEGERS = _Product("pa_compiler.dot_integers", "pa_dot_integers", "i16", "i32", "i32")


def select(mod: IRModule, target: CpuTarget, tiling: Tiling) -> IRModule:
    """The scheduled module with the instruction where a dot product of pairs is added to a sum, if the target has it.

    The tiling is decode's: where it multiplies no pairs, attend does not.

    The module given may be changed: use it no more.
    """
    products = [product for product in (_PAIRS, _INTEGERS) if product.dots(target)]
    if not products or tiling.keys.terms == 1:
        return mod
    from tvm.s_tir import Schedule

    _register()
    sch = Schedule(mod)
    for variable in mod.get_global_vars():
        sch.work_on(variable.name_hint)
        for product in products:
            sums = [sblock for sblock in sblocks(sch) if _replace_sum(sch, sblock, product)]
            if sums:
                lanes = {lanes for sblock in sums for lanes in _vectorized(sch, sblock)} | product.dots(target).keys()
                sch.annotate(sch.get_loops(sums[0])[0], "pragma_import_llvm", _definitions(lanes, target, product))
        for sblock in sblocks(sch):
            _keep_lanes(sch, sblock)
            _widen_copy(sch, sblock)
    return sch.mod


def _vectorized(sch: Schedule, sblock: SBlockRV) -> set[int]:
    """The extents of vectorized loops around an sblock."""
    from tvm.tirx import ForKind

    loops = [sch.get(loop) for loop in sch.get_loops(sblock)]
    return {int(loop.extent) for loop in loops if loop.kind == ForKind.VECTORIZED}


def _replace_sum(sch: Schedule, sblock: SBlockRV, product: _Product) -> bool:
    """Let an sblock that adds a dot product of pairs call the operation; whether it is one."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.tirx import Add, BufferStore, LShift, Mul, RShift

    old = sch.get(sblock)
    match old.body:
        case BufferStore(
            value=Add(a=total, b=Add(a=Mul(a=Call(args=[LShift(a=a)]), b=Call(args=[LShift(a=b)]))) as added)
        ) | BufferStore(
            value=Add(a=total, b=Add(a=Mul(a=RShift(a=LShift(a=a)), b=RShift(a=LShift(a=b)))) as added)
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
        case BitwiseOr(
            a=BitwiseAnd(a=Cast(value=first) as low), b=LShift(a=Cast(value=second) as high)
        ) if tvm_ffi.structural_equal(word, pair_integers(low, high)):
            return Call(_WIDEN, [first, second], ret_ty="int32")
        case _:
            return word


def _widen_copy(sch: Schedule, sblock: SBlockRV) -> None:
    """Let an sblock that stores the words of two codes make them by the operation."""
    from tvm.tirx import BufferStore

    body = sch.get(sblock).body
    if isinstance(body, BufferStore) and not (word := _widened_codes(body.value)).same_as(body.value):
        replace_body(sch, sch.get_sref(sblock), BufferStore(body.buffer, word, body.indices))


def _keep_lanes(sch: Schedule, sblock: SBlockRV) -> None:
    """Let an sblock that reads words for their lanes call the operation that says of which type they are."""
    from tvm.ir import Call
    from tvm.tirx import BufferStore

    old = sch.get(sblock)
    if LANES in old.annotations:
        call = Call(_LANES, [old.body.value], ret_ty="int32")
        replace_body(sch, sch.get_sref(sblock), BufferStore(old.body.buffer, call, old.body.indices))


@functools.cache
def _register() -> None:
    """Tell TVM of the operations, which are lane by lane."""
    import tvm_ffi
    from tvm.ir import register_op_attr
    from tvm.tirx.op import register_intrin_lowering

    pure = 1
    operations = [(each.op, "sum + product", functools.partial(_lower, each)) for each in (_PAIRS, _INTEGERS)]
    operations += [(_LANES, "words", _lower_lanes), (_WIDEN, "the word of two codes", _lower_widen)]
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


def _lower(product: _Product, call: Expr) -> Expr:
    """The instruction for whole vectors, plain operations for single lanes."""
    from tvm.tirx import call_pure_extern

    total, a, b = call.args
    lanes = total.ty.dtype.lanes
    if lanes == 1:
        return total + product.of_words(a, b)
    kind = "float32" if product is _PAIRS else "int32"
    return call_pure_extern(f"{kind}x{lanes}", product.of_lanes(lanes), total, a, b)


def _definitions(lanes: Iterable[int], target: CpuTarget, product: _Product) -> str:
    """LLVM's text of the functions that are called, inlined: TVM passes no bfloat16 vectors to an intrinsic."""
    dots = product.dots(target)
    parts = {each: math.gcd(each, max(dots)) for each in sorted(set(lanes) - dots.keys())}
    texts = [_instructions(dots) if product is _PAIRS else _integer_instructions(dots)]
    texts += [_widened(part, min(dots), product) for part in sorted(set(parts.values()) - dots.keys())]
    texts += [_in_parts(each, part, product) for each, part in parts.items() if each != part]
    if product is _INTEGERS:
        texts += [_widen(each) for each in sorted({*lanes, *dots})]
    elif target.by_element:
        texts += [_lanes(each) for each in dots]
    return " ".join(texts)


def _widen(lanes: int) -> str:
    """The function that makes words of codes that lie side by side."""
    codes, words = f"<{2 * lanes} x i8>", f"<{lanes} x i32>"
    return (
        f"define {words} @pa_widen_{lanes}({codes} %a) alwaysinline nounwind {{ "
        f"%x = sext {codes} %a to <{2 * lanes} x i16> %r = bitcast <{2 * lanes} x i16> %x to {words} ret {words} %r }}"
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
        f"define <{lanes} x float> @{_PAIRS.of_lanes(lanes)}(<{lanes} x float> %sum, <{lanes} x i32> %a, <{lanes} x i32> %b) "
        "alwaysinline nounwind { "
        f"%x = bitcast <{lanes} x i32> %a to <{2 * lanes} x bfloat> "
        f"%y = bitcast <{lanes} x i32> %b to <{2 * lanes} x bfloat> "
        f"%r = call <{lanes} x float> @{intrinsic}"
        f"(<{lanes} x float> %sum, <{2 * lanes} x bfloat> %x, <{2 * lanes} x bfloat> %y) "
        f"ret <{lanes} x float> %r }}"
        for lanes, intrinsic in dots.items()
    )


def _integer_instructions(dots: Mapping[int, str]) -> str:
    """The same of integers, whose vpmaddwd leaves the addition to another instruction.

    A fence behind it, which is no instruction, keeps LLVM from adding products up before they are added to the sum:
    registers for them are none.
    """
    texts = []
    for lanes, intrinsic in dots.items():
        words, numbers, floats = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{lanes} x float>"
        fence = f"@llvm.arithmetic.fence.v{lanes}f32"
        adds = "vpdpwssd" in intrinsic
        given = f"{words}, {numbers}, {numbers}" if adds else f"{numbers}, {numbers}"
        values = f"{words} %sum, {numbers} %x, {numbers} %y" if adds else f"{numbers} %x, {numbers} %y"
        added = f"%r = call {words} @{intrinsic}({values}) "
        if not adds:
            added = (
                f"%p = call {words} @{intrinsic}({values}) %s = add {words} %sum, %p "
                f"%f = bitcast {words} %s to {floats} %g = call {floats} {fence}({floats} %f) "
                f"%r = bitcast {floats} %g to {words} "
            )
        texts.append(
            f"declare {floats} {fence}({floats}) declare {words} @{intrinsic}({given}) "
            f"define {words} @{_INTEGERS.of_lanes(lanes)}({words} %sum, {words} %a, {words} %b) alwaysinline nounwind {{ "
            f"%x = bitcast {words} %a to {numbers} %y = bitcast {words} %b to {numbers} {added}ret {words} %r }}"
        )
    return " ".join(texts)


def _widened(lanes: int, whole: int, product: _Product) -> str:
    """The function for vectors that are shorter than any that there is an instruction for."""
    of = {product.short: product.sum, "i32": "i32"}
    insert = {name: f"@llvm.vector.insert.v{whole}{name}.v{lanes}{name}" for name in of}
    of_sum = product.short
    extract = f"@llvm.vector.extract.v{lanes}{of_sum}.v{whole}{of_sum}"
    short, long = ({name: f"<{count} x {kind}>" for name, kind in of.items()} for count in (lanes, whole))
    declared = f"declare {short[of_sum]} {extract}({long[of_sum]}, i64) " + "".join(
        f"declare {long[name]} {insert[name]}({long[name]}, {short[name]}, i64) " for name in of
    )
    steps = "".join(
        f"%{name}0 = call {long[kind]} {insert[kind]}({long[kind]} zeroinitializer, {short[kind]} %{name}, i64 0) "
        for name, kind in (("sum", of_sum), ("a", "i32"), ("b", "i32"))
    )
    return (
        f"{declared}define {short[of_sum]} @{product.of_lanes(lanes)}"
        f"({short[of_sum]} %sum, {short['i32']} %a, {short['i32']} %b) alwaysinline nounwind {{ {steps}"
        f"%r = call {long[of_sum]} @{product.of_lanes(whole)}"
        f"({long[of_sum]} %sum0, {long['i32']} %a0, {long['i32']} %b0) "
        f"%s = call {short[of_sum]} {extract}({long[of_sum]} %r, i64 0) ret {short[of_sum]} %s }}"
    )


def _in_parts(lanes: int, part: int, product: _Product) -> str:
    """The function for longer vectors, which takes them apart into parts that there is an instruction for."""
    of_sum = product.short
    sums, words = f"<{lanes} x {product.sum}>", f"<{lanes} x i32>"
    part_sums, part_words = f"<{part} x {product.sum}>", f"<{part} x i32>"
    insert = f"@llvm.vector.insert.v{lanes}{of_sum}.v{part}{of_sum}"
    extract = {name: f"@llvm.vector.extract.v{part}{name}.v{lanes}{name}" for name in (of_sum, "i32")}
    steps, result = "", "poison"
    for at in range(0, lanes, part):
        steps += (
            f"%s{at} = call {part_sums} {extract[of_sum]}({sums} %sum, i64 {at}) "
            f"%a{at} = call {part_words} {extract['i32']}({words} %a, i64 {at}) "
            f"%b{at} = call {part_words} {extract['i32']}({words} %b, i64 {at}) "
            f"%p{at} = call {part_sums} @{product.of_lanes(part)}"
            f"({part_sums} %s{at}, {part_words} %a{at}, {part_words} %b{at}) "
            f"%r{at} = call {sums} {insert}({sums} {result}, {part_sums} %p{at}, i64 {at}) "
        )
        result = f"%r{at}"
    of_words = "" if of_sum == "i32" else f"declare {part_words} {extract['i32']}({words}, i64) "
    return (
        f"declare {part_sums} {extract[of_sum]}({sums}, i64) {of_words}"
        f"declare {sums} {insert}({sums}, {part_sums}, i64) "
        f"define {sums} @{product.of_lanes(lanes)}({sums} %sum, {words} %a, {words} %b) alwaysinline nounwind "
        f"{{ {steps}ret {sums} {result} }}"
    )
