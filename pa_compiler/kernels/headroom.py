"""Room at the upper end of float32, for sums of values that reach as far as float32 does.

The weights of a softmax are at most 1, so N values of some size have sums that are N times as large. Here all weights
of a sequence are 2**-headroom times what they are elsewhere, with 2**headroom >= 2N: no sum of values, of a tile, of a
range or of all, is then larger than half of the largest of them. The denominator, which adds up the same weights, has
the same factor. A power of two changes nothing but exponents, so out has the bits that it would have without, and lse
too, whose logarithm takes the factor back.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.spec import PagedAttentionSpec

_BIAS = 127
"""Of the exponent that float32 stores."""


def headroom(spec: PagedAttentionSpec, context_len: Expr) -> Expr:
    """Binary places, int32, for all weights of a sequence: 0 for one token, otherwise 2 to 32.

    0 for float16: 2**30 of its largest values have a sum that is far from the end of float32.
    """
    if not spec.wide_range:
        return T.int32(0)
    last = T.Cast("float32", context_len - 1)
    return T.max(T.shift_right(T.reinterpret("int32", last), 23) - (_BIAS - 2), 0)


def lifted(total: Expr, places: Expr) -> Expr:
    """total * 2**places: a sum of weights as it is without the headroom."""
    return total * T.reinterpret("float32", T.shift_left(places + _BIAS, 23))
