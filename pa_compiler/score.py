"""Functions of scores and masks as people write them in Python, called once and kept as expressions.

A score_mod or a mask_mod is called with stand-ins for its arguments (tracing.py). What it computes becomes a Term, which
kernels lower, and a text, which is what it is known by: in the cache key, in the manifest, in explain. Imports no TVM,
NumPy or torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

ARGUMENTS = ("batch", "head", "query_pos", "key_pos")
"""What both functions are called with, by position, int32: the sequence's number in the batch, the query head, and
positions in the sequence, in tokens. A score_mod gets the scaled score before them, float32."""

INPUT_DTYPES = ("float32", "float16", "bfloat16", "int32", "bool")

BATCH = "batch"
"""In the shape of an input: as many as the call has sequences."""


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
