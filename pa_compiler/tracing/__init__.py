"""Calls a score_mod or a mask_mod with stand-ins for its arguments, and keeps what it computes.

Functions are Python of the user's: all that they may do goes through the stand-ins, and what they do with them that
cannot be compiled is an error that says where. NumPy and torch find the stand-ins by their protocols; torch is
imported by the function or not at all.
"""

from __future__ import annotations

import functools
import inspect
import linecache
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pa_compiler.score import ARGUMENTS, Function, Input, Term, names_read
from pa_compiler.score_text import text
from pa_compiler.tracing import operations as ops
from pa_compiler.tracing.operations import RefusedTypeError, RefusedValueError
from pa_compiler.tracing.stand_in import ArrayStandIn, Call, StandIn

_NOT_THE_USERS = ("pa_compiler.tracing", "numpy", "torch")
_LINE = 100
"""Characters of a line that is shown in an error; of a longer one its number has to do."""


def trace(field: str, function: Callable[..., Any], inputs: tuple[Input, ...], *, num_heads: int) -> Function:
    """What a Python function computes.

    It is called twice: two calls that compute something else are an error, for only one could be compiled.

    Args:
        field: "score_mod", which gets the score before ARGUMENTS, or "mask_mod".
        function: Called by position, and with those of the inputs by keyword for which it has a parameter.
        inputs: The arrays that it may read.
        num_heads: Query heads of the attention; an index of an array is checked for each.

    Raises:
        TypeError: function is not one, takes other arguments, does what cannot be compiled, or returns something else
            than a number (score_mod) or a bool (mask_mod). The message has the function, its line and the operation.
        ValueError: an index is outside of its array, the tensors that it closes over have more than 1 MB, or two calls
            computed something else.
    """
    if not callable(function):
        raise TypeError(f"{field}: expected a function, got {function!r} of type {type(function).__name__}")
    taken = _inputs_taken(field, function, inputs)
    call, result = _called(field, function, taken, num_heads)
    words = text(result)
    again = text(_called(field, function, taken, num_heads)[1])
    if words != again:
        raise ValueError(
            f"{field}: expected a function that always computes the same, but two calls of {_name(function)} gave "
            f"different expressions: {words} and {again}"
        )
    constants = call.constants.named(names_read(result))
    return Function(words, result, constants, function, call.uses_torch)


def _arguments(field: str) -> tuple[str, ...]:
    return ("score", *ARGUMENTS) if field == "score_mod" else ARGUMENTS


def _inputs_taken(field: str, function: Callable[..., Any], inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """The inputs for which a function has a parameter, after it was checked that it can be called so."""
    arguments = _arguments(field)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C that does not say
        return ()
    parameters = signature.parameters.values()
    by_position = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    filled = {each.name for each in by_position[: len(arguments)]}
    free = {each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)} - filled
    every = any(each.kind == each.VAR_KEYWORD for each in parameters)
    taken = tuple(each for each in inputs if each.name in free or (every and each.name not in filled))
    try:
        signature.bind(*arguments, **{each.name: each for each in taken})
    except TypeError as error:
        given = "".join(f", {each.name}=" for each in taken)
        raise TypeError(
            f"{field}: expected a function that can be called with ({', '.join(arguments)}{given}), "
            f"got {_name(function)}{signature}: {error}"
        ) from None
    return taken


def _called(field: str, function: Callable[..., Any], taken: tuple[Input, ...], num_heads: int) -> tuple[Call, Term]:
    """A call with stand-ins, and what it computes as the type that its field has."""
    call = Call(num_heads)
    arguments = [StandIn(call, Term(name, "float32" if name == "score" else "int32")) for name in _arguments(field)]
    try:
        returned = function(*arguments, **{each.name: ArrayStandIn(call, each) for each in taken})
    except (RefusedTypeError, RefusedValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{field}: {_name(function)}{_place(error)}: {error}") from error
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError | ArithmeticError | LookupError) else TypeError
        raise kind(f"{field}: {_name(function)} raised {type(error).__name__}: {error}{_place(error)}") from error
    return call, _result(field, function, call, returned)


def _result(field: str, function: Callable[..., Any], call: Call, returned: object) -> Term:
    wanted = "a number" if field == "score_mod" else "a bool"
    try:
        operand = call.operand(returned)
    except RefusedTypeError as error:
        raise TypeError(f"{field}: expected {wanted} from {_name(function)}, got {error}") from None
    dtype = ops.type_of(operand)
    if (dtype == "bool") != (field == "mask_mod"):
        shown = f"a value of {dtype}" if isinstance(operand, Term) else repr(operand)
        raise TypeError(f"{field}: expected {wanted} from {_name(function)}, got {shown}")
    return ops.cast(operand, "float32" if field == "score_mod" else "bool")


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _place(error: BaseException) -> str:
    """Where in the user's Python an error comes from: the innermost line outside of this room, NumPy and torch."""
    place = ""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if not any(module == name or module.startswith(f"{name}.") for name in _NOT_THE_USERS):
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            place = f", at {code.co_filename}:{trace.tb_lineno}{f' ({line})' if 0 < len(line) <= _LINE else ''}"
        trace = trace.tb_next
    return place
