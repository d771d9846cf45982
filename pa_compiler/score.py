"""Functions of scores and masks as people write them in Python, called once and kept as expressions.

A score_mod or a mask_mod is called with stand-ins for its arguments (tracing/). What it computes becomes a Term, which
kernels lower, and a text (score_text.py), which is what it is known by: in the cache key, in the manifest, in explain.
Imports no TVM, NumPy or torch.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

ARGUMENTS = ("batch", "head", "query_pos", "key_pos")
"""What both functions are called with, by position, int32: the sequence's number in the batch, the query head, and
positions in the sequence, in tokens. A score_mod gets the scaled score before them, float32."""

INPUT_DTYPES = ("float32", "float16", "bfloat16", "int32", "bool")

BATCH = "batch"
"""In the shape of an input: as many as the call has sequences."""


CONSTANT_BYTES = 1 << 20
"""Of all tensors that functions close over, at most: they are in the library."""


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


class Term:
    """A number that a function computes: an operation and the terms that it takes.

    Terms are never changed, and two that say the same are one object: what a function computes twice is there once, and
    comparing and hashing them costs nothing however large they are. So terms make a graph in which walks must not take
    a way twice: see `parts`. dataclasses.asdict must not see one.

    Attributes:
        op: What is computed:
            "score", "batch", "head", "query_pos", "key_pos": an argument.
            "number": the constant `value`; of float32, one that float32 holds.
            "element": an element of the array that `value` names, an Input or a Constant; args are its indices, int32.
                Of a floating type it is float32.
            "cast": args[0] as dtype; float32 to int32 towards zero, to bool whether it is not 0.
            "add", "subtract", "multiply", "negative", "absolute", "minimum", "maximum": of int32, which wraps around,
                or float32. The last two are NaN where an operand is.
            "divide": of float32.
            "floor_divide", "remainder": of int32 or float32, rounded down, as Python's // and % are.
            "less", "less_equal", "equal": of two terms of one dtype, int32 or float32, and "equal" of bool too; bool.
                The other comparisons are made of these.
            "and", "or", "xor", "not": of bool, or bit by bit of int32.
            "where": args[1] where args[0], a bool, else args[2].
            "exp", "log", "sqrt", "tanh", "sigmoid", "floor": of float32. Others are made of these.
        dtype: "float32", "int32" or "bool". Both operands of an operation have its dtype, but for comparisons.
        args: What it takes.
        value: Of "number" and "element" alone.
    """

    __slots__ = ("__weakref__", "args", "dtype", "op", "value")

    op: str
    dtype: str
    args: tuple[Term, ...]
    value: float | int | bool | str | None

    def __new__(  # noqa: D102 - as the class says
        cls, op: str, dtype: str, args: tuple[Term, ...] = (), value: float | int | bool | str | None = None
    ) -> Term:
        key = (op, dtype, args, repr(value))  # by text, for -0.0 is 0.0 and NaN is not NaN
        with _LOCK:
            term = _TERMS.get(key)
            if term is None:
                term = super().__new__(cls)
                for name, each in (("op", op), ("dtype", dtype), ("args", args), ("value", value)):
                    object.__setattr__(term, name, each)
                _TERMS[key] = term
        return term

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Term: expected that {name} stays as it is")

    def __reduce__(self) -> tuple[type[Term], tuple[Any, ...]]:
        return Term, (self.op, self.dtype, self.args, self.value)

    def __deepcopy__(self, memo: object) -> Term:
        return self

    def __repr__(self) -> str:
        return f"<Term {self.op} {self.dtype}>"


_TERMS: weakref.WeakValueDictionary[tuple[str, str, tuple[Term, ...], str], Term] = weakref.WeakValueDictionary()
_LOCK = threading.RLock()  # a collection inside of it may end a Term


def parts(term: Term) -> list[Term]:
    """The terms that it is made of, each once and after those that it takes; it is the last."""
    found: dict[Term, None] = {}
    waiting = [(term, False)]
    while waiting:
        each, taken = waiting.pop()
        if taken:
            found[each] = None
        elif each not in found:
            waiting.append((each, True))
            waiting.extend((arg, False) for arg in reversed(each.args))
    return list(found)


def names_read(term: Term) -> set[str]:
    """Names of the arrays of which it takes elements."""
    return {str(each.value) for each in parts(term) if each.op == "element"}


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
