"""Room at the upper end of float32, where queries, keys and values reach as far as it does.

For sums of values: weights are at most 1, so N values of some size may have a sum that is N times as large. All weights
of a sequence are therefore multiplied by 2**-headroom, with 2**headroom >= 2N. No sum of values, of a tile, of a range
or of all, is then larger than half of the largest of them. The denominator adds up the same weights; lse takes the
factor back.

For products of queries with keys: the scale of the scores comes as query_scale * score_scale. The first is a power of
two up to 1, as large as the scale is or nearly so. Queries are multiplied by it when they are loaded, so that a product
is about as large as the score that comes of it.

Powers of two change nothing but exponents: wherever there is room without, the results have the same bits.
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


def scaled(spec: PagedAttentionSpec, element: Expr, query_scale: Expr) -> Expr:
    """An element of a query, float32, times query_scale: exact where the product is a normal number.

    float16 as it is: its products with keys are far from both ends of float32.
    """
    return element * query_scale if spec.wide_range else element


def lifted(spec: PagedAttentionSpec, total: Expr, places: Expr) -> Expr:
    """total * 2**places, where places is headroom's: a sum of weights as it is without."""
    if not spec.wide_range:
        return total
    return total * T.reinterpret("float32", T.shift_left(places + _BIAS, 23))
