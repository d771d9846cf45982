"""Calls a score_mod or a mask_mod once, with stand-ins for its arguments, and keeps what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pa_compiler.score import Function, Input


def trace(field: str, function: Callable[..., Any], inputs: tuple[Input, ...], *, num_heads: int) -> Function:
    """What a Python function computes; field is "score_mod" or "mask_mod"."""
    raise NotImplementedError
