"""Functions of scores and masks as people write them in Python, called once and kept as expressions.

A score_mod or a mask_mod is called with stand-ins for its arguments (tracing.py). What it computes becomes a Term,
which kernels lower, and a text, which is what it is known by: in the cache key, in the manifest, in explain. Imports no
TVM, NumPy or torch.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

FIELDS = ("score_mod", "mask_mod")
"""The fields of a spec that are functions."""

ARGUMENTS = ("batch", "head", "query_pos", "key_pos")
"""What both functions are called with, by position, int32: the sequence's number in the batch, the query head, and
positions in the sequence, in tokens. A score_mod gets the scaled score before them, float32."""

INPUT_DTYPES = ("float32", "float16", "bfloat16", "int32", "bool")

BATCH = "batch"
"""In the shape of an input: as many as the call has sequences."""


MAX_INPUTS = 32
MAX_AXES = 8
MAX_ELEMENTS = (1 << 31) - 1
"""Of an input, so that int32 counts them; with "batch" at each call too."""

MAX_CONSTANT_BYTES = 1 << 20
"""Of all constants of a spec together."""


class Input(NamedTuple):
    """An array that functions read, given at each call.

    Attributes:
        name: By which the functions take it, as a keyword.
        dtype: One of INPUT_DTYPES. Elements of the three floating types are float32 to a function.
        shape: Numbers of elements; BATCH stands for the sequences of the call.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Constant(NamedTuple):
    """A tensor that a function closes over: it becomes a part of the library.

    Attributes:
        name: "table_" and 16 hexadecimal digits of the SHA-256 of all that follows, so that a text that names it says
            what is in it.
        dtype: One of INPUT_DTYPES.
        shape: Numbers of elements.
        data: The elements in C order, as they lie in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclasses.dataclass(frozen=True)
class Term:
    """A number that a function computes: an operation and the terms that it takes. Terms may be shared.

    Attributes:
        op: What is computed:
            "score", "batch", "head", "query_pos", "key_pos": an argument.
            "number": the constant `value`.
            "element": an element of the array that `value` names, an Input or a Constant; args are its indices, int32.
            "cast": args[0] as dtype; float32 to int32 towards zero, to bool whether it is not 0.
            "add", "subtract", "multiply", "negative", "absolute", "minimum", "maximum": of int32 or float32.
            "divide": of float32.
            "floor_divide", "remainder": of int32 or float32, rounded down, as Python's // and % are.
            "less", "less_equal", "equal": of two terms of one dtype; bool. The other comparisons are made of these.
            "and", "or", "xor", "not": of bool, or bit by bit of int32.
            "where": args[1] where args[0], a bool, else args[2].
            "exp", "log", "sqrt", "tanh", "sigmoid", "floor": of float32. Others are made of these.
        dtype: "float32", "int32" or "bool". Both operands of an operation have its dtype, but for comparisons.
        args: What it takes.
        value: Of "number" and "element" alone.
    """

    op: str
    dtype: str
    args: tuple[Term, ...] = ()
    value: float | int | bool | str | None = None


@dataclasses.dataclass(frozen=True)
class Function:
    """A score_mod or a mask_mod. Two with the same text are the same.

    Attributes:
        text: What it computes, on one line: "; " between parts that are used more than once and the result.
        result: The same as a term, float32 of a score_mod and bool of a mask_mod. None where the function was read from
            a library, which has its machine code and its text.
        constants: The tensors that it closes over, by name.
        source: The Python function, which the reference calls; None where it was read from a library.
        uses_torch: Whether that calls functions of torch, and so has to be called with tensors.
    """

    text: str
    result: Term | None = dataclasses.field(default=None, compare=False, repr=False)
    constants: tuple[Constant, ...] = dataclasses.field(default=(), compare=False, repr=False)
    source: Callable[..., Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    uses_torch: bool = dataclasses.field(default=False, compare=False, repr=False)

    def array_names(self) -> set[str]:
        """The inputs and constants that it reads; none where it was read from a library."""
        return {str(term.value) for term in _terms(self.result) if term.op == "element"}


def _terms(result: Term | None) -> Iterator[Term]:
    """A term and all that it is made of, each object once, however often it is used."""
    waiting, met = [result] if result is not None else [], set()
    while waiting:
        term = waiting.pop()
        if id(term) not in met:
            met.add(id(term))
            yield term
            waiting += term.args


def checked_inputs(inputs: Any) -> tuple[Input, ...]:
    """The inputs of a spec: of a mapping {name: (dtype, shape)}, or of a tuple of Input.

    Raises:
        TypeError, ValueError: a name, a dtype or a shape is none.
    """
    if isinstance(inputs, Mapping):
        items = list(inputs.items())
    elif isinstance(inputs, tuple) and all(isinstance(each, Input) for each in inputs):
        items = [(each.name, each[1:]) for each in inputs]
    else:
        raise TypeError(f"inputs: expected a mapping {{name: (dtype, shape)}}, got {inputs!r}")
    if len(items) > MAX_INPUTS:
        raise ValueError(f"inputs: expected up to {MAX_INPUTS} arrays, got {len(items)}")
    checked = tuple(_checked_input(name, declared) for name, declared in items)
    if len({each.name for each in checked}) < len(checked):
        raise ValueError(f"inputs: expected different names, got {', '.join(each.name for each in checked)}")
    return checked


def _checked_input(name: object, declared: Any) -> Input:
    if not isinstance(name, str):
        raise TypeError(f"inputs: expected names that are strings, got {name!r} of type {type(name).__name__}")
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name) or name in ("score", *ARGUMENTS):
        raise ValueError(
            f"inputs: expected names of letters, digits and _ that are no words of Python, nor score, "
            f"{', '.join(ARGUMENTS)}, got {name!r}"
        )
    said = f"inputs[{name!r}]"
    if not isinstance(declared, tuple | list) or len(declared) != 2:
        raise TypeError(f"{said}: expected (dtype, shape), got {declared!r}")
    dtype, shape = declared
    if not isinstance(dtype, str):
        raise TypeError(f"{said}: expected a dtype that is a string, got {dtype!r} of type {type(dtype).__name__}")
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"{said}: expected dtype {', '.join(INPUT_DTYPES)}, got {dtype!r}")
    return Input(str(name), INPUT_DTYPES[INPUT_DTYPES.index(dtype)], _checked_shape(said, shape))


def _checked_shape(said: str, shape: Any) -> tuple[int | str, ...]:
    if not isinstance(shape, tuple | list):
        raise TypeError(f"{said}: expected a shape that is a tuple, got {shape!r} of type {type(shape).__name__}")
    if not 1 <= len(shape) <= MAX_AXES:
        raise ValueError(f"{said}: expected 1 to {MAX_AXES} axes, got {len(shape)}")
    for extent in shape:
        if not isinstance(extent, int | str) or isinstance(extent, bool):
            raise TypeError(
                f'{said}: expected extents that are ints or "{BATCH}", got {extent!r} of type {type(extent).__name__}'
            )
        if extent != BATCH if isinstance(extent, str) else extent < 1:
            raise ValueError(f'{said}: expected extents from 1 on or "{BATCH}", got {extent!r}')
    found = tuple(BATCH if isinstance(extent, str) else int(extent) for extent in shape)
    elements = math.prod(extent for extent in found if isinstance(extent, int))
    if elements > MAX_ELEMENTS:
        raise ValueError(f"{said}: expected up to 2**31 - 1 elements, got {elements}")
    return found


def check_functions(functions: Sequence[Function], inputs: Sequence[Input]) -> None:
    """Check that functions read all inputs, and that all that they close over is not too much.

    Raises:
        ValueError: an input is not read, or constants are too many bytes.
    """
    if all(function.result is not None for function in functions):  # else a library has been built of them
        read = set().union(*(function.array_names() for function in functions))
        if unread := [each.name for each in inputs if each.name not in read]:
            raise ValueError(
                f"inputs: expected arrays that score_mod or mask_mod reads, got {', '.join(unread)}, not read by either"
            )
    constants = {constant.name: len(constant.data) for function in functions for constant in function.constants}
    if sum(constants.values()) > MAX_CONSTANT_BYTES:
        raise ValueError(
            f"score_mod and mask_mod: expected tensors of up to {MAX_CONSTANT_BYTES} bytes in all to close over, got "
            f"{sum(constants.values())}; larger ones can be inputs"
        )
