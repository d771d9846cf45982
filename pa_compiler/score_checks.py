"""The fields of a spec that are functions of scores, and their inputs, checked once."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pa_compiler.score import ARGUMENTS, BATCH, CONSTANT_BYTES, INPUT_DTYPES, Function, Input, names_read

FIELDS = ("score_mod", "mask_mod")
"""The fields of a spec that are functions."""

MAX_INPUTS = 32

MAX_AXES = 8

MAX_ELEMENTS = (1 << 31) - 1
"""Of an input, so that int32 counts them; with "batch" at each call too."""


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
        read = {name for function in functions if function.result for name in names_read(function.result)}
        if unread := [each.name for each in inputs if each.name not in read]:
            raise ValueError(
                f"inputs: expected arrays that score_mod or mask_mod reads, got {', '.join(unread)}, not read by either"
            )
    constants = {constant.name: len(constant.data) for function in functions for constant in function.constants}
    if sum(constants.values()) > CONSTANT_BYTES:
        raise ValueError(
            f"score_mod and mask_mod: expected tensors of up to {CONSTANT_BYTES} bytes in all to close over, got "
            f"{sum(constants.values())}; larger ones can be inputs"
        )
