"""Instructions that LLVM does not find by itself: dot products of bfloat16, and of integers of 16 or 8 bits.

They are vdpbf16ps or bfdot, vpdpwssd or vpmaddwd, and vpdpbusd or vpmaddubsw. The kernels say what they compute in
plain operations (kernels/elements.py), and on any other target those are compiled. Here sums of that form become calls
of an operation of our own, which TVM vectorizes and lowers to LLVM's intrinsic (products.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pa_compiler.cpu.products import FOURS, INTEGERS, PAIRS, Product, definitions
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.statements import changed, mapped, with_sblock
from pa_compiler.tiles import LANES, Tiling

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Expr
    from tvm.s_tir import SBlock
    from tvm.tirx import PrimFunc, Stmt

PRODUCTS = (PAIRS, INTEGERS, FOURS)

_LANES = "pa_compiler.lanes"
_WIDEN = "pa_compiler.widen"


def select(mod: IRModule, target: CpuTarget, tiling: Tiling) -> IRModule:
    """The scheduled module with the instruction where a dot product of pairs is added to a sum, if the target has it.

    The tiling is decode's: where it multiplies no pairs, attend does not.
    """
    from tvm import IRModule

    products = [product for product in PRODUCTS if product.dots(target)]
    if not products or tiling.keys.terms == 1:
        return mod
    _register()
    return IRModule(
        {variable: _selected(function, target, products) for variable, function in mod.functions.items()},
        attrs=mod.attrs,
    )


def _selected(function: PrimFunc, target: CpuTarget, products: list[Product]) -> PrimFunc:
    from tvm.ir import StringImm
    from tvm.s_tir import SBlock
    from tvm.tirx import AttrStmt, BufferStore, For, ForKind, IntImm

    found: dict[str, set[int]] = {}  # by the operation, the extents of vectorized loops around it

    def visit(statement: Stmt, vectors: frozenset[int] = frozenset()) -> Stmt:
        match statement:
            case SBlock(body=BufferStore(buffer=buffer, value=value, indices=indices)):
                operation, value = _operation(statement, value, products)
                if operation:
                    found.setdefault(operation, set()).update(vectors)
                return changed(statement, body=BufferStore(buffer, value, indices))
            case SBlock():
                vectors = frozenset()
            case For(kind=ForKind.VECTORIZED, extent=extent):
                vectors |= {int(extent)}
        return mapped(statement, lambda each: visit(each, vectors))

    def importing(text: str, statement: Stmt) -> Stmt:
        return AttrStmt(IntImm("int32", 0), "pragma_import_llvm", StringImm(text), statement)

    root = visit(function.body)
    for product in products:
        if product.op in found:
            lanes = found[product.op] | product.dots(target).keys()
            text = definitions(lanes, found.get(_LANES, set()), target, product)
            root = with_sblock(root, mapped(root.block, functools.partial(importing, text)))
    return function.with_body(root)


def _operation(sblock: SBlock, value: Expr, products: list[Product]) -> tuple[str, Expr]:
    """An operation of ours that stands for a sum or for words that are read for their lanes, and the value with it.

    "" where the value is neither; where it is the words of two codes, it has the operation that makes those.
    """
    from tvm.ir import Call

    if LANES in sblock.annotations:
        return _LANES, Call(_LANES, [value], ret_ty="int32")
    for product in products:
        if (sums := _sums(value, product)) is not None:
            return product.op, sums
    return "", _widened_codes(value)


def _sums(value: Expr, product: Product) -> Expr | None:
    """The operation that adds a dot product of pairs, in place of a value that does; None where it does not."""
    import tvm_ffi
    from tvm.ir import Call
    from tvm.tirx import Add, BitwiseAnd, LShift, Mul, RShift

    match value:
        case (
            Add(a=total, b=Add(a=Mul(a=Call(args=[LShift(a=a)]), b=Call(args=[LShift(a=b)]))) as added)
            | Add(a=total, b=Add(a=Mul(a=RShift(a=LShift(a=a)), b=RShift(a=LShift(a=b)))) as added)
            | Add(a=total, b=Add(a=Add(a=Add(a=Mul(a=RShift(a=LShift(a=a)), b=BitwiseAnd(a=b))))) as added)
        ) if tvm_ffi.structural_equal(added, product.of_words(a, b)):
            return Call(product.op, [total, _widened_codes(a), _widened_codes(b)], ret_ty=total.ty)
        case _:
            return None


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


@functools.cache
def _register() -> None:
    """Tell TVM of the operations, which are lane by lane."""
    import tvm_ffi
    from tvm.ir import register_op_attr
    from tvm.tirx.op import register_intrin_lowering

    pure = 1
    operations: list[tuple[str, str, Callable[[Any], Any]]] = [
        *((each.op, "sum + product", functools.partial(_lower, each)) for each in PRODUCTS),
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
    if product is not FOURS and isinstance(a, Broadcast):  # the one number for all lanes comes last, as bfdot has it
        a, b = b, a
    if lanes == 1:
        return total + product.of_words(a, b)
    kind = "float32" if product is PAIRS else "int32"
    return call_pure_extern(f"{kind}x{lanes}", product.of_lanes(lanes), total, a, b)
