"""How a word of a cache becomes numbers, and numbers words: the bits of the types in which keys and values are kept.

A word of two bfloat16 numbers is an int32: the first number in its low half, the second in its high half, as the dot
product of AVX512_BF16 takes them, here in operations that every CPU has.

`number` is where every element of a cache becomes float32: a code of 8 bits too, whose scale is not here but multiplies
scores and weights (kernels/scales.py). `paired` makes the word of two codes. Pairs of bfloat16 are multiplied as they
are and pass both by.
"""

import functools
import operator
from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.tiles import CODES_OF_WORD, Element

HIGH = -65536
"""The mask of a word's high half."""
LOW = 65535
"""The mask of a word's low half."""
INFINITE = 0x7F800000
"""The exponent of infinities and NaN, where float32 has it."""
MAGNITUDE = 0x7FFFFFFF
"""The bits of float32 without its sign."""
FOUR_ONES = 0x01010101
"""The word of four times 1."""
FOUR_CODES = 0x0F0F0F0F
"""The bits of four codes of 4 bits in the bytes of a word."""
PAIR_OF_ONES = 0x3F803F80
"""The word of 1 and 1."""
LARGEST_CODE = 15
"""Of 4 bits."""


def number(element: Element, word: Expr, index: Expr) -> Expr:
    """The number `index` of a word, as float32: of a pair the one that index % 2 says, of others the element itself.

    Of a code its number in units of UNITS.
    """
    if element.word == CODES_OF_WORD:
        code = T.shift_right(word, 4 * T.floormod(index, CODES_OF_WORD))
        return T.Cast("float32", T.bitwise_and(code, LARGEST_CODE))
    if element.dtype == "int4":
        return nibble(word, index)
    if element.word == 2:
        return half(word, index)
    return _OF_CODES[element.dtype](word) if element.dtype in _OF_CODES else T.Cast("float32", word)


def paired(element: Element, first: Expr, second: Expr) -> Expr:
    """The word of the numbers of two codes of 8 bits, which bfloat16 has: all of int8, and of both float8.

    Or of integers of 16 bits, for codes of int8.
    """
    if element.integers:
        return pair_integers(T.Cast("int32", first), T.Cast("int32", second))
    return pair_floats(number(element, first, 0), number(element, second, 0))


def _of_float8_e4m3fn(code: Expr) -> Expr:
    """The number of a code, an int8, in units of UNITS: exact, and NaN for its two NaN.

    The bits are moved to those of float16, whose exponent has a bit more, and counts 2**-8 of the number. Only the
    magnitude of NaN reaches bit 14 when a last place is added, and that bit makes NaN of it there too. Subnormal
    numbers are exact so, and no operation has one of float32's, which CPUs of Intel multiply in a hundred cycles more.
    """
    bits = T.bitwise_and(T.shift_left(T.Cast("int16", code), T.int16(7)), T.int16(-0x4080))
    nan = T.bitwise_and(bits + T.int16(0x80), T.int16(0x4000))
    return T.Cast("float32", T.reinterpret("float16", T.bitwise_or(bits, nan)))


def _of_float8_e5m2(code: Expr) -> Expr:
    """The number of a code, an int8: the upper half of float16."""
    return T.Cast("float32", T.reinterpret("float16", T.shift_left(T.Cast("int16", code), T.int16(8))))


def nibble(word: Expr, index: Expr) -> Expr:
    """The code of 4 bits that index % 2 says of a byte, as float32: the even one is the lower.

    The fence, which is no instruction, hides that the upper bits are 0: LLVM would take bytes apart before it widens
    them, each half in instructions of its own.
    """
    byte = T.Cast("int32", T.reinterpret("uint8", word))
    wide = T.reinterpret("int32", _fenced(T.reinterpret("float32", byte)))
    code = T.Select(T.floormod(index, 2) == 0, T.bitwise_and(wide, 15), T.shift_right(wide, 4))
    return T.Cast("float32", code)


def _fenced(x: Expr) -> Expr:
    """The same float32, of which LLVM knows nothing; no instruction."""
    return T.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", x)


UNITS = {"float8_e4m3fn": 256.0}
"""What the numbers of codes count, by their type, where it is not 1: scales take it in (kernels/scales.py)."""

_OF_CODES = {"float8_e4m3fn": _of_float8_e4m3fn, "float8_e5m2": _of_float8_e5m2}
"""How codes become float32, by their type; int8's are numbers by themselves."""


def half(word: Expr, index: Expr) -> Expr:
    """The number index % 2 of a word, as float32: the bits of bfloat16 are the upper half of float32's.

    The fence, which is no instruction, hides the mask's value: LLVM makes of a known one a blend with 0, which shares
    the units of the multiplications on AVX2 (on Zen 1 a matmul takes a fifth longer), where an AND has units to spare.
    """
    odd = T.bitwise_and(word, T.reinterpret("int32", _fenced(T.reinterpret("float32", T.int32(HIGH)))))
    return T.reinterpret("float32", T.Select(T.floormod(index, 2) == 0, T.shift_left(word, 16), odd))


def dot_pairs(a: Expr, b: Expr) -> Expr:
    """The dot product of two words, float32. Added to a float32 sum, it is one instruction of AVX512_BF16."""
    first = T.reinterpret("float32", T.shift_left(a, 16)) * T.reinterpret("float32", T.shift_left(b, 16))
    second = T.reinterpret("float32", T.bitwise_and(a, HIGH)) * T.reinterpret("float32", T.bitwise_and(b, HIGH))
    return first + second


def pair_integers(first: Expr, second: Expr) -> Expr:
    """The word of the lower halves of two int32: integers of 16 bits."""
    return T.bitwise_or(T.bitwise_and(first, LOW), T.shift_left(second, 16))


def dot_integers(a: Expr, b: Expr) -> Expr:
    """The dot product of two words of integers of 16 bits, int32: exact where not all four are the least that there is.

    Added to an int32 sum it is vpdpwssd, or vpmaddwd and an addition.
    """
    first = T.shift_right(T.shift_left(a, 16), 16) * T.shift_right(T.shift_left(b, 16), 16)
    return first + T.shift_right(a, 16) * T.shift_right(b, 16)


def four_integers(*numbers: Expr) -> Expr:
    """The word of the lowest bytes of four int32, the first one lowest: integers of 8 bits."""
    return functools.reduce(
        T.bitwise_or, (T.shift_left(T.bitwise_and(each, 255), 8 * place) for place, each in enumerate(numbers))
    )


def four_codes(word: Expr, index: Expr) -> Expr:
    """The word of four of the codes of a word: those of an even place, or, where index % 2 says so, of an odd one."""
    return T.bitwise_and(T.Select(T.floormod(index, 2) == 0, word, T.shift_right(word, 4)), FOUR_CODES)


def dot_fours(numbers: Expr, codes: Expr) -> Expr:
    """The dot product of a word of four integers of 8 bits and one of four codes of 4 bits, int32.

    Added to an int32 sum it is vpdpbusd, or vpmaddubsw, vpmaddwd and an addition.
    """
    products = [
        T.shift_right(T.shift_left(numbers, 24), 24) * T.bitwise_and(codes, 255),
        T.shift_right(T.shift_left(numbers, 16), 24) * T.bitwise_and(T.shift_right(codes, 8), 255),
        T.shift_right(T.shift_left(numbers, 8), 24) * T.bitwise_and(T.shift_right(codes, 16), 255),
        T.shift_right(numbers, 24) * T.bitwise_and(T.shift_right(codes, 24), 255),
    ]
    return functools.reduce(operator.add, products)


def product_of(element: Element) -> Callable[[Expr, Expr], Expr]:
    """What a step of a matmul adds to a sum: the product of two numbers, or the dot product of two words."""
    if element.integers:
        return dot_integers if element.terms == 2 else dot_fours
    return dot_pairs if element.terms == 2 else operator.mul


def zero_of(element: Element) -> Expr:
    """What a sum of products begins with."""
    return T.int32(0) if element.integers else T.float32(0)


def larger_exponent(word: Expr) -> Expr:
    """The larger exponent of the two numbers of a word, where float32 has it."""
    return T.max(T.bitwise_and(T.shift_left(word, 16), INFINITE), T.bitwise_and(word, INFINITE))


def pair_halves(first: Expr, second: Expr, index: Expr) -> Expr:
    """The word of the numbers index % 2 of two words: of rows of two tokens, one element of both."""
    evens = T.bitwise_or(T.bitwise_and(first, LOW), T.shift_left(second, 16))
    odds = T.bitwise_or(T.bitwise_and(T.shift_right(first, 16), LOW), T.bitwise_and(second, HIGH))
    return T.Select(T.floormod(index, 2) == 0, evens, odds)


def pair_floats(first: Expr, second: Expr) -> Expr:
    """The word of two float32 numbers that bfloat16 has."""
    low = T.bitwise_and(T.shift_right(T.reinterpret("int32", first), 16), LOW)
    return T.bitwise_or(low, T.reinterpret("int32", second))


def pair_rounded(first: Expr, second: Expr) -> Expr:
    """The word of the numbers of bfloat16 that are nearest to two float32 numbers, of two such the larger.

    They are positive, or as in round_to_bfloat16.
    """
    half = T.int32(1 << 15)
    low = T.bitwise_and(T.shift_right(T.reinterpret("int32", first) + half, 16), LOW)
    return T.bitwise_or(low, T.bitwise_and(T.reinterpret("int32", second) + half, HIGH))


def round_up_to_bfloat16(x: Expr) -> Expr:
    """What pair_rounded makes of one number, as float32."""
    return T.reinterpret("float32", T.bitwise_and(T.reinterpret("int32", x) + T.int32(1 << 15), HIGH))


def round_to_bfloat16(x: Expr) -> Expr:
    """The number of bfloat16 that is nearest to x, of two the even one, as float32.

    x is finite, or a NaN whose lower 16 bits are 0, as are all that come of a bfloat16 NaN or of an invalid operation.
    """
    bits = T.reinterpret("int32", x)
    odd = T.bitwise_and(T.shift_right(bits, 16), 1)
    return T.reinterpret("float32", T.bitwise_and(bits + 32767 + odd, HIGH))
