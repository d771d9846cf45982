"""What terms and their texts mean, in NumPy: float64 for float32, int64 for int32. Shares nothing with the tracing."""

from __future__ import annotations

import numpy

MEANING = {
    "add": numpy.add,
    "subtract": numpy.subtract,
    "multiply": numpy.multiply,
    "divide": numpy.divide,
    "floor_divide": numpy.floor_divide,
    "remainder": numpy.remainder,
    "negative": numpy.negative,
    "absolute": numpy.absolute,
    "minimum": numpy.minimum,
    "maximum": numpy.maximum,
    "less": numpy.less,
    "less_equal": numpy.less_equal,
    "equal": numpy.equal,
    "and": numpy.bitwise_and,
    "or": numpy.bitwise_or,
    "xor": numpy.bitwise_xor,
    "not": numpy.invert,
    "where": numpy.where,
    "exp": numpy.exp,
    "log": numpy.log,
    "sqrt": numpy.sqrt,
    "tanh": numpy.tanh,
    "sigmoid": lambda x: 1 / (1 + numpy.exp(-x)),
    "floor": numpy.floor,
}
TYPES = {"float32": numpy.float64, "int32": numpy.int64, "bool": numpy.bool_}


def converted(value, dtype):
    value = numpy.asarray(value)
    return value != 0 if dtype == "bool" else value.astype(TYPES[dtype])


def term_value(term, values, arrays, known=None):
    """A term of arguments {name: array} and of the elements of {name: array}. Checks the types that terms say."""
    known = {} if known is None else known
    if term in known:
        return known[term]
    args = [term_value(each, values, arrays, known) for each in term.args]
    types = [each.dtype for each in term.args]
    if term.op == "number":
        value = TYPES[term.dtype](term.value)
    elif term.op == "element":
        assert types == ["int32"] * arrays[term.value].ndim
        value = arrays[term.value][tuple(args)]
    elif term.op == "cast":
        assert types != [term.dtype]
        value = converted(args[0], term.dtype)
    elif not args:
        assert term.dtype == ("float32" if term.op == "score" else "int32")
        value = values[term.op]
    else:
        assert len(set(types[1:] if term.op == "where" else types)) == 1
        assert term.dtype == ("bool" if term.op in ("less", "less_equal", "equal") else types[-1])
        value = MEANING[term.op](*args)
    known[term] = value
    return value


def text_value(text, values, arrays):
    """A text, as Python reads it."""
    names = {
        **MEANING,
        **values,
        **arrays,
        **{dtype: lambda value, dtype=dtype: converted(value, dtype) for dtype in TYPES},
        "inf": numpy.inf,
        "nan": numpy.nan,
    }
    *named, result = text.split("; ")
    for each in named:
        name, _, expression = each.partition(" = ")
        names[name] = eval(expression, {}, names)
    return eval(result, {}, names)
