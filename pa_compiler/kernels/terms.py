"""Terms of functions of scores as expressions of TensorIR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion, Let, Var

from pa_compiler.kernels import functions
from pa_compiler.kernels.caches import whole
from pa_compiler.kernels.elements import INFINITE, MAGNITUDE
from pa_compiler.kernels.kept import Value
from pa_compiler.score import Term, parts

_INT32_ENDS = (-(2.0**31), 2.0**31 - 128)
"""The least and the largest number of float32 that int32 has."""


Fence = Callable[[Expr], Expr]
"""A number of float32 -> the same, of which TVM knows nothing."""


def lowered(
    term: Term,
    arguments: Mapping[str, Expr | Value],
    arrays: Mapping[str, Buffer],
    kept: Mapping[Term, Expr],
    fence: Fence,
) -> Value:
    """A term as an expression. What is used more than once in it is computed once.

    Integers wrap around at 32 bits, and no operation is undefined: a division by 0 is 0, and a float32 that int32 does
    not have is the nearest that it has, NaN the least. Indices of elements are within their arrays (indices.py).

    Args:
        term: What is computed.
        arguments: By name; also "batch_size", the sequences of the call. Those that are read as Values.
        arrays: By name; as arrays.py matches them.
        kept: Where the values of some terms are, those of bools as int32.
        fence: Of the target (Tiling.fence).
    """
    order = _without_kept(term, kept)
    operands = [arg for each in order for arg in each.args * (1 + (each.op in _REPEATING))]
    uses, used = Counter(operands), {each: kept[each] for each in (*operands, term) if each in kept}
    known = {each: tir.NE(at, T.int32(0)) if each.dtype == "bool" else at for each, at in used.items()}
    bound: list[tuple[Var, Expr]] = []
    reads: list[Expr | BufferRegion] = []
    for each in order:
        if isinstance(argument := arguments.get(each.op), Value):
            reads += argument.reads
        value = _operation(each, [known[arg] for arg in each.args], arguments, arrays, fence)
        if uses[each] > 1 and each.op != "number":
            is_bool = each.dtype == "bool"  # bound as a number: TVM does not bind vectors of bools
            dtype, number = ("int32", _one_or_zero(value)) if is_bool else (each.dtype, value)
            variable = Var(each.op, dtype)
            bound.append((variable, _opaque(number, dtype, fence)))
            value = tir.NE(variable, T.int32(0)) if is_bool else variable
        known[each] = value
    result = known[term]
    for variable, value in reversed(bound):
        result = Let(variable, value, result)
    elements = dict.fromkeys(str(each.value) for each in order if each.op == "element")
    return Value(result, [*(whole(arrays[name]) for name in elements), *used.values(), *reads])


def _without_kept(term: Term, kept: Mapping[Term, Expr]) -> list[Term]:
    """As parts, without those that are kept and what only they are made of."""
    order, needed = parts(term), {term}
    for each in reversed(order):
        if each in needed and each not in kept:
            needed.update(each.args)
    return [each for each in order if each in needed and each not in kept]


def _operation(
    term: Term, args: list[Expr], arguments: Mapping[str, Expr | Value], arrays: Mapping[str, Buffer], fence: Fence
) -> Expr:
    if term.op in arguments:
        argument = arguments[term.op]
        return argument.expression if isinstance(argument, Value) else argument
    if term.op == "number":
        return _NUMBERS[term.dtype](term.value)
    if term.op == "element":
        assert isinstance(term.value, str)
        return _element(arrays[term.value], args)
    if term.op == "cast":
        return _CASTS[term.args[0].dtype, term.dtype](args[0])
    of = term.args[0].dtype
    if (term.op, of) in _NEGATING:
        return _NEGATING[term.op, of](lambda x: T.Not(_opaque(x, "bool", fence)), *args)
    return (_OPERATIONS.get((term.op, of)) or _OPERATIONS[term.op, ""])(*args)


def _opaque(value: Expr, dtype: str, fence: Fence) -> Expr:
    """The same value, of which TVM knows nothing.

    TVM would replace a variable by its value wherever it stands, and knows no NaN: it takes what is not less for
    greater or equal.
    """
    if dtype == "float32":
        return fence(value)
    bits = T.Select(value, T.int32(-1), T.int32(0)) if dtype == "bool" else value
    fenced = T.reinterpret("int32", fence(T.reinterpret("float32", bits)))
    return tir.NE(fenced, T.int32(0)) if dtype == "bool" else fenced


def _element(array: Buffer, indices: Iterable[Expr]) -> Expr:
    """An element of an array: float32, int32 or bool."""
    element = array[tuple(indices) or (0,)]
    if array.dtype == "int8":  # the memory of bools
        return tir.NE(T.Cast("int32", element), T.int32(0))
    return element if array.dtype == "int32" else T.Cast("float32", element)


def _wrapping(operation: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """An operation of int32 that wraps around: TVM has LLVM assume of 32 bits that they never do.

    LLVM makes of the wide operation a plain one of 32 bits.
    """

    def wrapping(a: Expr, b: Expr) -> Expr:
        return T.Cast("int32", operation(T.Cast("int64", a), T.Cast("int64", b)))

    return wrapping


_subtract = _wrapping(tir.Sub)


def _divided(operation: Callable[[Expr, Expr], Expr], by_minus_one: Callable[[Expr], Expr]) -> Callable[..., Expr]:
    """A division of int32 that is defined for every divisor."""

    def divided(a: Expr, b: Expr) -> Expr:
        if isinstance(b, tir.IntImm) and b.value not in (0, -1):
            return operation(a, b)
        divisor, safe, result = (Var(name, "int32") for name in ("divisor", "safe_divisor", "quotient"))
        special = T.Or(tir.EQ(divisor, T.int32(0)), tir.EQ(divisor, T.int32(-1)))
        of_special = T.Select(tir.EQ(divisor, T.int32(0)), T.int32(0), by_minus_one(a))
        # outside of the choice, which is between numbers that both are computed: within, TVM takes the guard off again
        quotient = Let(result, operation(a, safe), T.Select(special, of_special, result))
        return Let(divisor, b, Let(safe, T.Select(special, T.int32(1), divisor), quotient))

    return divided


def _floor_divide(a: Expr, b: Expr) -> Expr:
    """float32, by a quotient of float64, which is below an integer where the exact one is."""
    return T.Cast("float32", _floor64(tir.Div(T.Cast("float64", a), T.Cast("float64", b))))


def _remainder(a: Expr, b: Expr) -> Expr:
    """float32 that has the sign of b."""
    wide, divisor = Var("dividend", "float64"), Var("divisor", "float64")
    rest = tir.Sub(wide, tir.Mul(_floor64(tir.Div(wide, divisor)), divisor))
    return Let(wide, T.Cast("float64", a), Let(divisor, T.Cast("float64", b), T.Cast("float32", rest)))


def _floor64(x: Expr) -> Expr:
    """The largest integer that is not above x, of float64: the nearest one, or the one before it."""
    number, bits, nearest = Var("quotient", "float64"), Var("quotient_bits", "int64"), Var("nearest", "float64")
    rounding, end = T.float64(1.5 * 2.0**52), T.float64(2.0**51)
    below = tir.Sub(nearest, T.Select(nearest > number, T.float64(1), T.float64(0)))
    # from bits: TVM folds (t + c) - c
    whole = Let(nearest, tir.Sub(T.reinterpret("float64", bits), rounding), below)
    whole = Let(bits, T.reinterpret("int64", tir.Add(number, rounding)), whole)
    return Let(number, x, T.Select(T.And(number < end, number > -end), whole, number))


def _minimum(a: Expr, b: Expr) -> Expr:
    """The smaller of two numbers of float32; NaN where either is."""
    return _chosen(a, b, lambda a, b: a < b)


def _maximum(a: Expr, b: Expr) -> Expr:
    """The larger of two numbers of float32; NaN where either is."""
    return _chosen(a, b, lambda a, b: a > b)


def _chosen(a: Expr, b: Expr, before: Callable[[Expr, Expr], Expr]) -> Expr:
    if isinstance(a, tir.FloatImm):
        a, b = b, a
    x, y = Var("first", "float32"), Var("second", "float32")
    if isinstance(b, tir.FloatImm):
        return Let(x, a, T.Select(before(b, x), b, x))  # x of NaN
    is_nan = T.bitwise_and(T.reinterpret("int32", x), MAGNITUDE) > T.int32(INFINITE)  # of bits: TVM knows no NaN
    return Let(x, a, Let(y, b, T.Select(is_nan, x, T.Select(before(x, y), x, y))))


def _absolute(x: Expr) -> Expr:
    return T.reinterpret("float32", T.bitwise_and(T.reinterpret("int32", x), MAGNITUDE))


def _negative(x: Expr) -> Expr:
    return T.reinterpret("float32", T.bitwise_xor(T.reinterpret("int32", x), T.int32(-(2**31))))


def _truncated(x: Expr) -> Expr:
    """float32 as int32, towards zero, within int32."""
    low, high = map(T.float32, _INT32_ENDS)
    number = Var("number", "float32")
    return Let(number, x, T.Cast("int32", T.Select(number > low, T.Select(number < high, number, high), low)))


def _one_or_zero(x: Expr) -> Expr:
    return T.Select(x, T.int32(1), T.int32(0))


_REPEATING = {"tanh", "exp", "absolute", "floor_divide", "remainder"}
"""Operations whose expressions have an operand more than once."""

_NUMBERS = {
    "float32": lambda value: T.float32(value),
    "int32": lambda value: T.int32(value),
    "bool": lambda value: T.bool(value),
}

_CASTS = {
    ("float32", "int32"): _truncated,
    ("float32", "bool"): lambda x: tir.NE(T.bitwise_and(T.reinterpret("int32", x), MAGNITUDE), T.int32(0)),
    ("int32", "float32"): lambda x: T.Cast("float32", x),
    ("int32", "bool"): lambda x: tir.NE(x, T.int32(0)),
    ("bool", "float32"): lambda x: T.Select(x, T.float32(1), T.float32(0)),
    ("bool", "int32"): lambda x: _one_or_zero(x),
    **{(dtype, dtype): lambda x: x for dtype in ("float32", "int32", "bool")},
}

_NEGATING: dict[tuple[str, str], Callable[..., Expr]] = {
    ("not", "bool"): lambda negated, a: negated(a),
}
"""The operation that negates a bool, which is hidden from TVM; as _OPERATIONS."""

_OPERATIONS: dict[tuple[str, str], Callable[..., Expr]] = {
    ("add", "float32"): tir.Add,
    ("subtract", "float32"): tir.Sub,
    ("multiply", "float32"): tir.Mul,
    ("negative", "float32"): _negative,
    ("absolute", "float32"): _absolute,
    ("minimum", "float32"): _minimum,
    ("maximum", "float32"): _maximum,
    ("divide", "float32"): tir.Div,
    ("floor_divide", "float32"): _floor_divide,
    ("remainder", "float32"): _remainder,
    ("add", "int32"): _wrapping(tir.Add),
    ("subtract", "int32"): _subtract,
    ("multiply", "int32"): _wrapping(tir.Mul),
    ("negative", "int32"): lambda x: _subtract(T.int32(0), x),
    ("absolute", "int32"): lambda x: T.Select(x < T.int32(0), _subtract(T.int32(0), x), x),
    ("minimum", "int32"): tir.Min,
    ("maximum", "int32"): tir.Max,
    ("floor_divide", "int32"): _divided(tir.FloorDiv, lambda x: _subtract(T.int32(0), x)),
    ("remainder", "int32"): _divided(tir.FloorMod, lambda x: T.int32(0)),
    ("and", "int32"): T.bitwise_and,
    ("or", "int32"): T.bitwise_or,
    ("xor", "int32"): T.bitwise_xor,
    ("not", "int32"): lambda x: T.bitwise_xor(x, T.int32(-1)),
    ("less", ""): tir.LT,
    ("less_equal", ""): tir.LE,
    ("equal", ""): tir.EQ,
    ("equal", "bool"): lambda a, b: tir.EQ(_one_or_zero(a), _one_or_zero(b)),
    ("xor", "bool"): lambda a, b: tir.NE(_one_or_zero(a), _one_or_zero(b)),
    ("and", "bool"): T.And,
    ("or", "bool"): T.Or,
    ("where", ""): T.Select,
    ("exp", ""): functions.exp,
    ("log", ""): functions.log,
    ("sqrt", ""): functions.sqrt,
    ("tanh", ""): functions.tanh,
    ("sigmoid", ""): functions.sigmoid,
    ("floor", ""): functions.floor,
}
"""By the operation and the dtype of its first operand; "" where they are alike."""
