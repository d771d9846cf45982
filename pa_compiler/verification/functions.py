"""The functions of a spec as the reference calls them: a library has their texts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pa_compiler import tracing
from pa_compiler.score import Function
from pa_compiler.spec import PagedAttentionSpec


def with_functions(
    spec: PagedAttentionSpec, score_mod: Callable[..., Any] | None, mask_mod: Callable[..., Any] | None
) -> PagedAttentionSpec:
    """A spec with these functions, which have to compute what its own do; None leaves one that has its source.

    Raises:
        TypeError: the spec has no such function; or there is none to call. Also what tracing raises.
        ValueError: one computes something else.
    """
    given = {"score_mod": score_mod, "mask_mod": mask_mod}
    known: dict[str, Any] = {
        field: _known(spec, field, getattr(spec, field), function) for field, function in given.items()
    }
    return dataclasses.replace(spec, **known)


def _known(
    spec: PagedAttentionSpec, field: str, of_spec: Function | None, given: Callable[..., Any] | None
) -> Function | None:
    if of_spec is None:
        if given is not None:
            raise TypeError(f"{field}: expected None, since the spec has no {field}, got {given!r}")
        return None
    if given is None:
        if of_spec.source is None:
            raise TypeError(
                f"{field}: expected the function that the library was compiled of, for the reference to call, got None"
            )
        return of_spec
    traced = tracing.trace(field, given, spec.inputs, num_heads=spec.num_heads)
    if traced.text != of_spec.text:
        raise ValueError(f"{field}: expected a function that computes {of_spec.text}, got {traced.text}")
    return traced
