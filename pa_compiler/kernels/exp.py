"""exp for the softmax, in operations that every vector unit has.

`T.exp` on a vector becomes one libm call a lane. This is the usual range reduction, exp(x) = 2**n * exp(f) with
n = round(x / ln 2) and |f| <= ln(2) / 2, and a polynomial of degree 6 for exp(f) (Cephes, single/expf.c: S. L. Moshier,
Methods and Programs for Mathematical Functions, 1989).
"""

from tvm.script import tirx as T

from pa_compiler.kernels.script import inline

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # ten bits: n * _LN2_HIGH is exact for every n that occurs
_LN2_LOW = -2.12194440e-4
_C2, _C3, _C4 = 5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2
_C5, _C6, _C7 = 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4
_SMALLEST = -87.0  # below it exp leaves the normal float32 numbers: the result is 0
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves round(t) in the low bits of the significand
_ROUND_BITS = 0x4B400000


@inline
def store_exp(buffer, indices, x, valid):
    """buffer[indices] = exp(x) where valid, else 0; for float32 x <= 0, with a relative error below 2e-7.

    Exactly 1 at 0, exactly 0 below -87, NaN for NaN.
    """
    arg: T.let = x
    bits: T.let = T.reinterpret("int32", arg * T.float32(_LOG2_E) + T.float32(_ROUND))  # anything below _SMALLEST
    n: T.let = T.Cast("float32", bits - _ROUND_BITS)
    f: T.let = arg - n * T.float32(_LN2_HIGH) - n * T.float32(_LN2_LOW)
    high: T.let = ((T.float32(_C7) * f + T.float32(_C6)) * f + T.float32(_C5)) * f + T.float32(_C4)
    series: T.let = ((high * f + T.float32(_C3)) * f + T.float32(_C2)) * f * f + f + T.float32(1)
    power: T.let = T.reinterpret("float32", T.shift_left(bits + 127, 23))
    buffer[indices] = T.Select(valid, T.Select(arg < T.float32(_SMALLEST), T.float32(0), series * power), T.float32(0))
