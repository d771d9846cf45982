"""How the words of a cache become operands on a GPU: numbers of 16 bits as they are, codes of 8 bits by way of float16.

float16 has all numbers of all codes, infinities and NaN of float8 too, and a word holds two of them. bfloat16 and
float32 are made of these, exactly too. Scales are not here: they multiply scores, weights and sums (scales.py).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.tiles import Element
from pa_compiler.tvmscript import inline


def pair_of_codes(element: Element) -> Callable[..., None]:
    """(word, first, second, pairs, at): pairs[at] = the numbers of two of a word's four codes, as float16.

    first and second say which codes; the number of the first is in the lower half.
    """
    if element.dtype == "float8_e4m3fn" and element.by_instruction:
        return _by_instruction
    return _BY_BITS[element.dtype]


def operand_of_codes(element: Element, dtype: str) -> Callable[..., None]:
    """The same as numbers of a type of 16 bits, of which tensor cores take pairs."""
    pair_stage = pair_of_codes(element)

    @inline
    def stage(word, first, second, pairs, at):
        pair_stage(word, first, second, pairs, at)
        if dtype == "bfloat16":
            T.ptx["cvt.rn.bf16x2.f32"](pairs[at], half(pairs[at], 1), half(pairs[at], 0))

    return stage


def numbers_of_words(element: Element, count: int) -> Callable[..., None]:
    """(words, numbers): numbers[i] = element i of so many words, float32."""
    if not element.is_code:
        return _as_they_are(element, count)
    pair_stage = pair_of_codes(element)

    @inline
    def stage(words, numbers):
        pair = T.alloc_buffer((2,), "uint32", scope="local")
        for w in T.unroll(count):
            pair_stage(words[w], 0, 1, pair, 0)
            pair_stage(words[w], 2, 3, pair, 1)
            for i in T.unroll(4):
                numbers[w * 4 + i] = half(pair[i // 2], i % 2)

    return stage


def _as_they_are(element: Element, count: int) -> Callable[..., None]:
    @inline
    def stage(words, numbers):
        for i in T.unroll(count * element.of_word):
            numbers[i] = _number(element.dtype, words, i)

    return stage


def half(word: Expr, index: Expr) -> Expr:
    """The number in the lower half of a word of two float16 numbers, or in its upper one, as float32."""
    bits = T.shift_right(word, T.Select(index % 2 == 1, T.uint32(16), T.uint32(0)))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))


def _number(dtype: str, words: Expr, i: Expr) -> Expr:
    """Element i of some words of a type that is no code."""
    if dtype == "float32":
        return T.cuda.uint_as_float(words[i])
    if dtype == "float16":
        return half(words[i // 2], i)
    odd = T.bitwise_and(words[i // 2], T.uint32(0xFFFF0000))
    return T.cuda.uint_as_float(T.Select(i % 2 == 1, odd, T.shift_left(words[i // 2], T.uint32(16))))


def _in_lower_bytes(first: int, second: int) -> Expr:
    """prmt's selector of two bytes of a word, each below a byte of another word."""
    return T.uint32(first | 4 << 4 | second << 8 | 4 << 12)


def _in_upper_bytes(first: int, second: int) -> Expr:
    """The same, each above such a byte."""
    return T.uint32(4 | first << 4 | 4 << 8 | second << 12)


@inline
def _of_int8(word, first, second, pairs, at):
    """With its sign turned over, a code counts from 128 on below the exponent of 1024: less 1152 it is the number."""
    T.ptx["prmt.b32"](
        pairs[at],
        T.bitwise_xor(word, T.uint32(0x80808080)),
        T.uint32(0x64646464),
        _in_lower_bytes(first, second),
    )
    T.ptx["sub.f16x2"](pairs[at], pairs[at], T.uint32(0x64806480))


@inline
def _of_e5m2(word, first, second, pairs, at):
    """A code is the upper half of its number."""
    T.ptx["prmt.b32"](pairs[at], word, T.uint32(0), _in_upper_bytes(first, second))


@inline
def _of_e4m3(word, first, second, pairs, at):
    """A magnitude is moved to where it counts 2**-8 of the number.

    Only that of NaN reaches bit 14 when a last place is added, and that bit makes NaN of it there too.
    """
    T.ptx["prmt.b32"](pairs[at], word, T.uint32(0), _in_upper_bytes(first, second))
    magnitude: T.uint32 = T.bitwise_and(T.shift_right(pairs[at], T.uint32(1)), T.uint32(0x3F803F80))
    nan: T.uint32 = T.bitwise_and(magnitude + T.uint32(0x00800080), T.uint32(0x40004000))
    sign: T.uint32 = T.bitwise_and(pairs[at], T.uint32(0x80008000))
    T.ptx["mul.f16x2"](
        pairs[at], T.bitwise_or(T.bitwise_or(magnitude, nan), sign), T.uint32(0x5C005C00)
    )  # fmt: skip


@inline
def _by_instruction(word, first, second, pairs, at):
    """The instruction takes two codes side by side."""
    if second == first + 1:
        T.ptx["cvt.rn.f16x2.e4m3x2"](pairs[at], T.Cast("uint16", T.shift_right(word, T.uint32(8 * first))))
    else:
        T.ptx["prmt.b32"](pairs[at], word, T.uint32(0), T.uint32(first | second << 4))
        T.ptx["cvt.rn.f16x2.e4m3x2"](pairs[at], T.Cast("uint16", pairs[at]))


_BY_BITS = {"int8": _of_int8, "float8_e5m2": _of_e5m2, "float8_e4m3fn": _of_e4m3}
