"""exp for the softmax, in operations that every vector unit has.

`T.exp` on a vector becomes one libm call a lane. This is the usual range reduction, exp(x) = 2**n * exp(f) with
n = round(x / ln 2) and |f| <= ln(2) / 2, ln 2 in two parts (Cephes, single/expf.c: S. L. Moshier, Methods and Programs
for Mathematical Functions, 1989), and 1 + f + f**2 p(f) for exp(f), where p is the polynomial of degree 4 with the
least relative error of the sum, 3e-9: a twentieth of what rounding costs.
"""

from tvm.script import tirx as T

from pa_compiler.tvmscript import inline

LOG2_E = 1.4426950408889634
_LN2 = 0.6931471805599453
LN2_HIGH = 0.693359375  # ten bits: n * LN2_HIGH is exact for every n that occurs
LN2_LOW = -2.12194440e-4
EXP_P = (0.49999994, 0.16666521, 0.041668389, 0.0083687156, 0.0013814602)
_P0, _P1, _P2, _P3, _P4 = EXP_P
_SMALLEST = -87.0  # below it exp leaves the normal float32 numbers: the result is 0
_ROUND = 12583039.0  # 1.5 * 2**23 + 127: adding it leaves round(t) + 127 in the low bits of the significand


_T1, _T2, _T3, _T4 = (0.6931241750717163, 0.24024099111557007, 0.0559065118432045, 0.009582841768860817)


@inline
def store_weight(buffer, indices, x, headroom):
    """buffer[indices] = exp(x) / 2**headroom for float32 x <= 0, with a relative error below 1e-5.

    For what is then rounded to bfloat16, which loses up to 4e-3: two thirds of store_exp's operations. 2**f is the
    polynomial of degree 4 with the least relative error, 3e-6, of those that are 1 at 0. Its ends are store_exp's.
    """
    arg: T.let = x
    places = T.meta_var(T.Cast("float32", headroom))
    rounding = T.meta_var(T.float32(_ROUND) - places)
    smallest = T.meta_var(T.float32(_SMALLEST) + places * T.float32(_LN2))
    bits: T.let = T.reinterpret("int32", arg * T.float32(LOG2_E) + rounding)  # anything below the smallest
    f: T.let = arg * T.float32(LOG2_E) - (T.reinterpret("float32", bits) - rounding)
    high: T.let = (T.float32(_T4) * f + T.float32(_T3)) * f + T.float32(_T2)
    series: T.let = (high * f + T.float32(_T1)) * f + T.float32(1)
    power: T.let = T.reinterpret("float32", T.shift_left(bits, 23))
    buffer[indices] = T.Select(arg < smallest, T.float32(0), series * power)


@inline
def store_exp(buffer, indices, x, valid, headroom=None):
    """buffer[indices] = exp(x) / 2**headroom where valid, else 0; for float32 x <= 0, with a relative error below 2e-7.

    Exactly 2**-headroom at 0, exactly 0 below -87 + headroom * ln 2, NaN for NaN. headroom is 0 unless given, and up to
    32. It takes no operation: it goes into the exponent that the power of two gets.
    """
    arg: T.let = x
    places = T.meta_var(T.float32(0) if headroom is None else T.Cast("float32", headroom))
    rounding = T.meta_var(T.float32(_ROUND) - places)
    smallest = T.meta_var(T.float32(_SMALLEST) + places * T.float32(_LN2))
    bits: T.let = T.reinterpret("int32", arg * T.float32(LOG2_E) + rounding)  # anything below the smallest
    n: T.let = T.reinterpret("float32", bits) - rounding  # from bits: TVM folds (t + c) - c
    f: T.let = arg - n * T.float32(LN2_HIGH) - n * T.float32(LN2_LOW)
    high: T.let = (T.float32(_P4) * f + T.float32(_P3)) * f + T.float32(_P2)
    p: T.let = (high * f + T.float32(_P1)) * f + T.float32(_P0)
    series: T.let = p * (f * f) + f + T.float32(1)
    power: T.let = T.reinterpret("float32", T.shift_left(bits, 23))
    buffer[indices] = T.Select(valid, T.Select(arg < smallest, T.float32(0), series * power), T.float32(0))
