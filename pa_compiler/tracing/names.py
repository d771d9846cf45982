"""The names by which functions ask for operations: Python's, NumPy's, torch's and those of methods of tensors."""

from __future__ import annotations

from collections.abc import Callable

from pa_compiler.score import Term
from pa_compiler.tracing import operations as ops

Build = Callable[..., Term]

_COMPARISONS: dict[str, Build] = {
    "lt": ops.less,
    "le": ops.less_equal,
    "gt": ops.greater,
    "ge": ops.greater_equal,
    "eq": ops.equal,
    "ne": ops.not_equal,
}

_TWO: dict[str, Build] = {
    "add": ops.add,
    "sub": ops.subtract,
    "mul": ops.multiply,
    "truediv": ops.divide,
    "floordiv": ops.floor_divide,
    "mod": ops.remainder,
    "pow": ops.power,
    "and": ops.bits_and,
    "or": ops.bits_or,
    "xor": ops.bits_xor,
    "lshift": ops.left_shift,
    "rshift": ops.right_shift,
}

PYTHON: dict[str, Build] = {
    **_COMPARISONS,
    **_TWO,
    **{f"r{name}": ops.reflected(build) for name, build in _TWO.items()},
    "neg": ops.negative,
    "abs": ops.absolute,
    "invert": ops.invert,
    "pos": lambda input: ops.add(input, 0) if ops.type_of(input) == "bool" else input,
}
"""Without the underscores: "add" of __add__."""

_SAME = (
    *("add", "subtract", "multiply", "floor_divide", "remainder", "minimum", "maximum", "reciprocal", "sign", "square"),
    *("exp", "exp2", "log", "log2", "log10", "sqrt", "tanh", "floor", "ceil", "trunc", "isnan", "isinf", "isfinite"),
    *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "where", "zeros_like", "ones_like"),
    *("logical_and", "logical_or", "logical_xor", "logical_not"),
)
"""Names that the functions of operations.py have too."""

_BOTH: dict[str, Build] = {
    **{name: getattr(ops, name) for name in _SAME},
    "absolute": ops.absolute,
    "abs": ops.absolute,
    "negative": ops.negative,
    "positive": PYTHON["pos"],
    "divide": ops.divide,
    "true_divide": ops.divide,
    "bitwise_and": ops.bits_and,
    "bitwise_or": ops.bits_or,
    "bitwise_xor": ops.bits_xor,
    "bitwise_not": ops.invert,
    "bitwise_left_shift": ops.left_shift,
    "bitwise_right_shift": ops.right_shift,
    "full_like": ops.filled_like,
    "clip": ops.clamp,
}

NUMPY: dict[str, Build] = {
    **_BOTH,
    "fabs": ops.absolute,
    "invert": ops.invert,
    "power": ops.power,
    "float_power": ops.power,
    "left_shift": ops.left_shift,
    "right_shift": ops.right_shift,
    "rint": ops.round_to_even,
    "clip": lambda a, a_min=None, a_max=None, *, min=None, max=None: ops.clamp(
        a, min if a_min is None else a_min, max if a_max is None else a_max
    ),
}
"""By the __name__ of what arrives at __array_ufunc__ and __array_function__."""

TORCH: dict[str, Build] = {
    **_BOTH,
    **PYTHON,
    "div": ops.divide,
    "rdiv": ops.reflected(ops.divide),
    "rsub": ops.reflected(ops.subtract),
    "max": ops.maximum,
    "min": ops.minimum,
    "clamp": ops.clamp,
    "clamp_min": lambda input, min: ops.clamp(input, min, None),
    "clamp_max": lambda input, max: ops.clamp(input, None, max),
    "sigmoid": ops.sigmoid,
    "special_expit": ops.sigmoid,
    "relu": ops.relu,
    "rsqrt": ops.rsqrt,
    "fix": ops.trunc,
    "round": ops.round_to_even,
    "special_exp2": ops.exp2,
    "float_power": ops.power,
    "masked_fill": ops.masked_fill,
}
"""By the __name__ of what arrives at __torch_function__, without underscores around it; methods of tensors are here too."""

METHODS = (TORCH.keys() - PYTHON.keys() - {"where"}) | set(_COMPARISONS) | {"abs", "add", "sub", "mul", "pow", "neg"}
"""Those of TORCH that tensors have as methods."""
