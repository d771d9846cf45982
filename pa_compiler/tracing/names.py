"""The names by which functions ask for operations: Python's, NumPy's, torch's and those of methods of tensors."""

from __future__ import annotations

from collections.abc import Callable

from pa_compiler.score import Term
from pa_compiler.tracing import composed, operations

Build = Callable[..., Term]

_COMPARISONS: dict[str, Build] = {
    "lt": operations.less,
    "le": operations.less_equal,
    "gt": operations.greater,
    "ge": operations.greater_equal,
    "eq": operations.equal,
    "ne": operations.not_equal,
}

_TWO: dict[str, Build] = {
    "add": operations.add,
    "sub": operations.subtract,
    "mul": operations.multiply,
    "truediv": operations.divide,
    "floordiv": operations.floor_divide,
    "mod": operations.remainder,
    "pow": composed.power,
    "and": operations.bits_and,
    "or": operations.bits_or,
    "xor": operations.bits_xor,
    "lshift": composed.left_shift,
    "rshift": composed.right_shift,
}

PYTHON: dict[str, Build] = {
    **_COMPARISONS,
    **_TWO,
    **{f"r{name}": operations.reflected(build) for name, build in _TWO.items()},
    "neg": operations.negative,
    "abs": operations.absolute,
    "invert": operations.invert,
    "pos": operations.positive,
}
"""Operators without their underscores: "add" of __add__."""

_OPERATIONS = (
    *(
        "add",
        "subtract",
        "multiply",
        "divide",
        "floor_divide",
        "remainder",
        "minimum",
        "maximum",
        "negative",
        "absolute",
    ),
    *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "where", "positive"),
    *("logical_and", "logical_or", "logical_xor", "logical_not", "exp", "log", "sqrt", "tanh", "floor"),
)
_COMPOSED = (
    *("reciprocal", "sign", "square", "exp2", "log2", "log10", "ceil", "trunc", "isnan", "isinf", "isfinite"),
    *("zeros_like", "ones_like", "full_like"),
)

_BOTH: dict[str, Build] = {
    **{name: getattr(operations, name) for name in _OPERATIONS},
    **{name: getattr(composed, name) for name in _COMPOSED},
    "abs": operations.absolute,
    "true_divide": operations.divide,
    "bitwise_and": operations.bits_and,
    "bitwise_or": operations.bits_or,
    "bitwise_xor": operations.bits_xor,
    "bitwise_not": operations.invert,
    "fix": composed.trunc,
}

NUMPY: dict[str, Build] = {
    **_BOTH,
    "fabs": operations.absolute,
    "invert": operations.invert,
    "power": composed.power,
    "left_shift": composed.left_shift,
    "right_shift": composed.right_shift,
    "rint": composed.nearest,
    "round": composed.nearest,
    "clip": lambda a, a_min=None, a_max=None, *, min=None, max=None: composed.clamp(
        a, min if a_min is None else a_min, max if a_max is None else a_max
    ),
}
"""By the __name__ of what arrives at __array_ufunc__ and __array_function__."""

TORCH: dict[str, Build] = {
    **_BOTH,
    **PYTHON,
    "div": operations.divide,
    "rdiv": operations.reflected(operations.divide),
    "max": operations.maximum,
    "min": operations.minimum,
    "bitwise_left_shift": composed.left_shift,
    "bitwise_right_shift": composed.right_shift,
    "clip": composed.clamp,
    "clamp": composed.clamp,
    "clamp_min": lambda input, min: composed.clamp(input, min, None),
    "clamp_max": lambda input, max: composed.clamp(input, None, max),
    "sigmoid": operations.sigmoid,
    "special_expit": operations.sigmoid,
    "special_exp2": composed.exp2,
    "relu": composed.relu,
    "rsqrt": composed.rsqrt,
    "round": composed.nearest,
    "masked_fill": composed.masked_fill,
}
"""By the __name__ of what arrives at __torch_function__, without underscores around it."""

METHODS: dict[str, Build] = {
    **{name: build for name, build in TORCH.items() if name not in PYTHON or name in ("abs", "neg", *_COMPARISONS)},
    **{name: TORCH[name] for name in ("add", "sub", "mul", "pow")},
    "where": lambda input, condition, other: operations.where(condition, input, other),
}
"""Methods of tensors."""

NUMPY_METHODS = ("clip", "round")
"""Those that arrays of NumPy have too."""
