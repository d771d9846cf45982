"""Dot products of pairs that LLVM does not find by itself, and the functions by which it is given them.

Each is an operation of TVM's by which a scheduled module says it (instructions.py). That becomes a call of a function
for vectors of some size, whose text in LLVM's language is here: TVM passes no bfloat16 vectors to an intrinsic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pa_compiler.cpu.target import VPMADDWD, CpuTarget

if TYPE_CHECKING:
    from tvm.ir import Expr


class Product(NamedTuple):
    """A sum of products for which there are instructions.

    Attributes:
        op: The name of the operation, (sum, a, b) -> sum + product.
        name: The name of its functions in LLVM, without the lanes.
        number, sum: LLVM's types of the numbers of a word, and of the sum.
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
        from pa_compiler.kernels import elements

        return (
            elements.dot_pairs if self is PAIRS else elements.dot_integers if self is INTEGERS else elements.dot_fours
        )

    def dots(self, target: CpuTarget) -> Mapping[int, str]:
        """The target's intrinsics by the lanes of their vectors; or none."""
        return target.dots if self is PAIRS else target.integer_dots if self is INTEGERS else target.byte_dots

    def of_lanes(self, lanes: int) -> str:
        """The function of vectors of so many lanes."""
        return f"{self.name}_{lanes}"


PAIRS = Product("pa_compiler.dot_pairs", "pa_dot_pairs", "bfloat", "float", "f32")
INTEGERS = Product("pa_compiler.dot_integers", "pa_dot_integers", "i16", "i32", "i32")
FOURS = Product("pa_compiler.dot_fours", "pa_dot_fours", "i8", "i32", "i32")
"""Of a word of signed bytes, a, and one of unsigned ones, b."""


def definitions(lanes: Iterable[int], of_words: Iterable[int], target: CpuTarget, product: Product) -> str:
    """LLVM's text of the functions that are called, which are inlined.

    lanes are those of sums, and of_words those of vectors that are loaded for their lanes.
    """
    dots = product.dots(target)
    parts = {each: math.gcd(each, max(dots)) for each in sorted(set(lanes) - dots.keys())}
    texts = [_instructions(dots) if product is PAIRS else _integer_instructions(dots, product)]
    texts += [_widened(part, min(dots), product) for part in sorted(set(parts.values()) - dots.keys())]
    texts += [_in_parts(each, part, product) for each, part in parts.items() if each != part]
    if product is INTEGERS:
        texts += [_widen(each) for each in sorted({*lanes, *dots})]
    elif product is PAIRS:
        texts += [_blocks(target.dot_blocks)] if target.dot_blocks else []
        texts += [_lanes(each) for each in sorted(of_words)]
    return " ".join(texts)


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
        f"define <{lanes} x float> @{PAIRS.of_lanes(lanes)}"
        f"(<{lanes} x float> %sum, <{lanes} x i32> %a, <{lanes} x i32> %b) alwaysinline nounwind {{ "
        f"%x = bitcast <{lanes} x i32> %a to <{2 * lanes} x bfloat> "
        f"%y = bitcast <{lanes} x i32> %b to <{2 * lanes} x bfloat> "
        f"%r = call <{lanes} x float> @{intrinsic}"
        f"(<{lanes} x float> %sum, <{2 * lanes} x bfloat> %x, <{2 * lanes} x bfloat> %y) "
        f"ret <{lanes} x float> %r }}"
        for lanes, intrinsic in dots.items()
    )


def _integer_instructions(dots: Mapping[int, str], product: Product) -> str:
    """The same of integers, whose vpmaddwd leaves the addition to another instruction, and vpmaddubsw half of it.

    A fence behind it, which is no instruction, keeps LLVM from adding products up before they are added to the sum:
    registers for them are none.
    """
    texts = []
    for lanes, intrinsic in dots.items():
        words, halves, floats = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{lanes} x float>"
        numbers, in_bytes = (f"<{4 * lanes} x i8>", True) if product is FOURS else (halves, False)
        fence = f"@llvm.arithmetic.fence.v{lanes}f32"
        adds = "vpdp" in intrinsic
        operands = f"{numbers} %y, {numbers} %x" if in_bytes else f"{numbers} %x, {numbers} %y"
        given = f"{words}, {numbers}, {numbers}" if adds else f"{numbers}, {numbers}"
        found, declared = words, ""
        added = f"%r = call {words} @{intrinsic}({words} %sum, {operands}) "
        if not adds:
            products = f"%p = call {words} @{intrinsic}({operands}) "
            if in_bytes:
                found, pairs = halves, VPMADDWD[lanes]
                ones = ", ".join(["i16 1"] * 2 * lanes)
                declared = f"declare {words} @{pairs}({halves}, {halves}) "
                products = f"%h = call {halves} @{intrinsic}({operands}) "
                products += f"%p = call {words} @{pairs}({halves} %h, {halves} <{ones}>) "
            added = (
                f"{products}%s = add {words} %sum, %p "
                f"%f = bitcast {words} %s to {floats} %g = call {floats} {fence}({floats} %f) "
                f"%r = bitcast {floats} %g to {words} "
            )
        texts.append(
            f"declare {floats} {fence}({floats}) declare {found} @{intrinsic}({given}) {declared}"
            f"define {words} @{product.of_lanes(lanes)}"
            f"({words} %sum, {words} %a, {words} %b) alwaysinline nounwind {{ "
            f"%x = bitcast {words} %a to {numbers} %y = bitcast {words} %b to {numbers} {added}ret {words} %r }}"
        )
    return " ".join(texts)


def _widened(lanes: int, whole: int, product: Product) -> str:
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


def _in_parts(lanes: int, part: int, product: Product) -> str:
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
