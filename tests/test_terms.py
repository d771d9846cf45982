"""Terms as expressions of kernels: every operation, in vectors, of ordinary and of extreme numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from pa_compiler import backends
from pa_compiler import tvmscript as script
from pa_compiler.cpu import build, target
from pa_compiler.kernels.terms import lowered
from pa_compiler.score import Term
from pa_compiler.tiles import Tiling

COUNT, LANES = 1 << 14, 16
X, Y = Term("score", "float32"), Term("y", "float32")
KEY, QUERY = Term("key_pos", "int32"), Term("query_pos", "int32")
ARGUMENTS = ("score", "y", "key_pos", "query_pos")


def number(value, dtype):
    return Term("number", dtype, (), value)


def operation(name, *args, dtype=None):
    return Term(name, dtype or args[0].dtype, args)


def wrapped(value):
    """int32 of int64."""
    return (value & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def divided(function):
    return lambda a, b: np.where(b == 0, 0, function(a, np.where(b == 0, 1, b)))


def truncated(x):
    low, high = np.float32(-(2.0**31)), np.float32(2.0**31 - 128)
    return np.where(x > low, np.minimum(x, high), low).astype(np.int32)


FLOATS = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "less": np.less,
    "less_equal": np.less_equal,
    "equal": np.equal,
}
INTEGERS = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "floor_divide": divided(np.floor_divide),
    "remainder": divided(np.remainder),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "less": np.less,
    "less_equal": np.less_equal,
    "equal": np.equal,
}
COMPARISONS = {"less", "less_equal", "equal"}
BOOLS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "equal": np.equal}


def dtype_of(name, dtype):
    return "bool" if name in COMPARISONS else dtype


@pytest.fixture(scope="module")
def numbers():
    """x and y, float32; i and j, int32: of each kind some special ones, in all pairs, and others."""
    rng = np.random.default_rng(0)
    special = np.array([0, -0.0, 1, -1, 0.5, 3, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 2.0**31, 2.0**23, -2.5])
    integers = np.array([0, 1, -1, 2, -2, 7, 2**31 - 1, -(2**31), 2**30, -(2**30) - 1, 1000003])
    pairs = np.array(np.meshgrid(special, special)).reshape(2, -1)
    int_pairs = np.array(np.meshgrid(integers, integers)).reshape(2, -1)
    x, y = (rng.standard_cauchy(COUNT) * 10 for _ in range(2))
    i, j = (rng.integers(-(2**31), 2**31, COUNT) >> rng.integers(0, 31, COUNT) for _ in range(2))
    x[: pairs.shape[1]], y[: pairs.shape[1]] = pairs
    i[: int_pairs.shape[1]], j[: int_pairs.shape[1]] = int_pairs
    return x.astype(np.float32), y.astype(np.float32), i.astype(np.int32), j.astype(np.int32)


@pytest.fixture(scope="module")
def evaluate(numbers):
    """evaluate(term) -> what it is for each of the numbers."""
    cpu = target.resolve(backends.normalize("llvm"))

    def evaluated(term):
        if term.dtype == "bool":
            return evaluated(Term("cast", "int32", (term,))).astype(bool)

        @script.prim_func(s_tir=True)
        def kernel(x_: T.handle, y_: T.handle, i_: T.handle, j_: T.handle, out_: T.handle):
            x = T.match_buffer(x_, (COUNT,), "float32")
            y = T.match_buffer(y_, (COUNT,), "float32")
            i = T.match_buffer(i_, (COUNT,), "int32")
            j = T.match_buffer(j_, (COUNT,), "int32")
            out = T.match_buffer(out_, (COUNT,), term.dtype)
            for group, lane in T.grid(COUNT // LANES, LANES):
                with T.sblock("term"):
                    at = T.axis.spatial(COUNT, group * LANES + lane)
                    T.reads(x[at], y[at], i[at], j[at])
                    T.writes(out[at])
                    given = T.meta_var(dict(zip(ARGUMENTS, (x[at], y[at], i[at], j[at]), strict=True)))
                    out[at] = lowered(term, given, {}, {}, Tiling.fence).expression

        sch = tvm.s_tir.Schedule(tvm.IRModule({"kernel": kernel}))
        sch.work_on("kernel")
        sch.vectorize(sch.get_loops("term")[-1])
        out = tvm.runtime.tensor(np.zeros(COUNT, term.dtype))
        build.translate(sch.mod, cpu)["kernel"](*map(tvm.runtime.tensor, numbers), out)
        return out.numpy()

    return evaluated


def assert_equal(actual, expected):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", FLOATS)
def test_of_two_floats(evaluate, numbers, name):
    with np.errstate(all="ignore"):
        expected = FLOATS[name](*numbers[:2])
    assert_equal(evaluate(operation(name, X, Y, dtype=dtype_of(name, "float32"))), expected)


@pytest.mark.parametrize("name", ["minimum", "maximum", "divide", "subtract"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_of_a_float_and_a_number(evaluate, numbers, name, value):
    constant = number(value, "float32")
    with np.errstate(all="ignore"):
        assert_equal(evaluate(operation(name, X, constant)), FLOATS[name](numbers[0], np.float32(value)))
        assert_equal(evaluate(operation(name, constant, X)), FLOATS[name](np.float32(value), numbers[0]))


@pytest.mark.parametrize("name", INTEGERS)
def test_of_two_integers(evaluate, numbers, name):
    """They wrap around, and no division faults."""
    expected = INTEGERS[name](*(each.astype(np.int64) for each in numbers[2:]))
    expected = expected if name in COMPARISONS else wrapped(expected)
    assert_equal(evaluate(operation(name, KEY, QUERY, dtype=dtype_of(name, "int32"))), expected)


@pytest.mark.parametrize("divisor", [1, 3, 8, -1, -7, 0])
@pytest.mark.parametrize("name", ["floor_divide", "remainder"])
def test_division_by_a_number(evaluate, numbers, name, divisor):
    expected = wrapped(INTEGERS[name](numbers[2].astype(np.int64), np.int64(divisor)))
    assert_equal(evaluate(operation(name, KEY, number(divisor, "int32"))), expected)


def test_of_one(evaluate, numbers):
    x, _, i, _ = numbers
    assert_equal(evaluate(operation("negative", X)), -x)
    assert_equal(evaluate(operation("absolute", X)), np.abs(x))
    assert_equal(evaluate(operation("negative", KEY)), wrapped(-i.astype(np.int64)))
    assert_equal(evaluate(operation("absolute", KEY)), wrapped(np.abs(i.astype(np.int64))))
    assert_equal(evaluate(operation("not", KEY)), ~i)


def test_casts(evaluate, numbers):
    x, _, i, _ = numbers
    with np.errstate(all="ignore"):
        assert_equal(evaluate(operation("cast", X, dtype="int32")), truncated(x))
    assert_equal(evaluate(operation("cast", X, dtype="bool")), x != 0)
    assert_equal(evaluate(operation("cast", KEY, dtype="float32")), i.astype(np.float32))
    assert_equal(evaluate(operation("cast", KEY, dtype="bool")), i != 0)


@pytest.mark.parametrize("name", BOOLS)
def test_of_two_bools(evaluate, numbers, name):
    one, other = operation("less", X, Y, dtype="bool"), operation("less", KEY, QUERY, dtype="bool")
    x, y, i, j = numbers
    assert_equal(evaluate(operation(name, one, other, dtype="bool")), BOOLS[name](x < y, i < j))
    assert_equal(evaluate(operation("not", one, dtype="bool")), ~(x < y))
    assert_equal(evaluate(operation("where", one, X, Y, dtype="float32")), np.where(x < y, x, y))
    assert_equal(evaluate(operation("cast", one, dtype="float32")), (x < y).astype(np.float32))


def test_division_of_floats_is_rounded_down(evaluate, numbers):
    x, y = (each.astype(np.float64) for each in numbers[:2])
    with np.errstate(all="ignore"):
        quotient = np.floor(x / y)
        exact = x - quotient * y
    quotients, rests = evaluate(operation("floor_divide", X, Y)), evaluate(operation("remainder", X, Y))
    ordinary = np.isfinite(x) & np.isfinite(y) & (np.abs(quotient) < 2.0**24) & (np.abs(y) > 1e-30)
    assert ordinary.sum() > COUNT // 2
    assert_equal(quotients[ordinary], quotient[ordinary].astype(np.float32))
    np.testing.assert_allclose(rests[ordinary], exact[ordinary], rtol=1e-6, atol=1e-30)


def test_what_is_used_often_is_computed_once(evaluate, numbers):
    """Doublings of a term that each name it twice."""
    term = operation("multiply", X, number(2.0**-12, "float32"))
    for _ in range(12):
        term = operation("add", term, term)
    with np.errstate(all="ignore"):
        expected = (numbers[0] * np.float32(2.0**-12)) * np.float32(2.0**12)
    assert_equal(evaluate(term), expected)
