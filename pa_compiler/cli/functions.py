"""Functions of scores as a command names them: module:function, as a program in the working directory imports them."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

FIELDS = {
    "score_mod": "score_mod(score, batch, head, query_pos, key_pos), as module:function.",
    "mask_mod": "mask_mod(batch, head, query_pos, key_pos), as module:function.",
}
"""The options by the fields of a spec that they give, with what is said of them."""


def imported(name: str) -> Callable[..., Any]:
    """The function of "module:function"; of "module:names.of.it" the attribute of an attribute.

    Raises:
        ValueError: there is none, or the module cannot be imported.
    """
    module_name, _, attributes = name.partition(":")
    if not module_name or not attributes:
        raise ValueError(f"expected module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"expected module:function, got {name!r}, whose module cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        function = functools.reduce(getattr, attributes.split("."), module)
    except AttributeError as error:
        raise ValueError(f"expected module:function, got {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"expected module:function, got {name!r}, which is {function!r}")
    return function
