"""score_mod and mask_mod for the reference: the Python functions themselves, called with arrays.

Nothing of what kernels are made of is used: no stand-ins and no terms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pa_compiler.score import ARGUMENTS, Function


class Places(NamedTuple):
    """Where the scores of one sequence are.

    Attributes:
        batch: The number of the sequence.
        query_pos: The position of its query token.
        key_pos: [tokens], of its keys.
        inputs: The arrays that functions may read, by their names.
    """

    batch: int
    query_pos: int
    key_pos: np.ndarray
    inputs: Mapping[str, np.ndarray]

    def mask(self, function: Function | Callable[..., Any], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Which keys are seen, and for which the mask has read what is in no input: bool [num_kv_heads, group, tokens].

        Called with arrays that broadcast to [num_heads, tokens].
        """
        head = np.arange(shape[0] * shape[1])[:, None]
        arguments = (np.array([[self.batch]]), head, np.array([[self.query_pos]]), self.key_pos[None])
        seen, outside = _called("mask_mod", function, arguments, self.inputs)
        whole = (len(head), shape[2])
        return (
            np.broadcast_to(seen.astype(bool), whole).reshape(shape),
            np.broadcast_to(outside, whole).reshape(shape),
        )

    def score(
        self, function: Function | Callable[..., Any], scores: np.ndarray, visible: np.ndarray | None
    ) -> np.ndarray:
        """What becomes of scores [num_kv_heads, group, tokens], of those alone that are visible; NaN of the others."""
        flat = scores.reshape(scores.shape[0] * scores.shape[1], scores.shape[2])
        head, token = np.nonzero(np.ones(flat.shape, bool) if visible is None else visible.reshape(flat.shape))
        count = np.ones(len(head), np.int64)
        arguments = (flat[head, token], self.batch * count, head, self.query_pos * count, self.key_pos[token])
        found, outside = _called("score_mod", function, arguments, self.inputs)
        result = np.full(flat.shape, np.nan)
        result[head, token] = np.where(outside, np.nan, found.astype(np.float64))
        return result.reshape(scores.shape)


def _called(
    field: str,
    function: Function | Callable[..., Any],
    arguments: tuple[np.ndarray, ...],
    inputs: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """What a function computes, and where it has read outside of an input; both broadcast to its arguments."""
    source = function.source if isinstance(function, Function) else function
    if source is None:
        raise TypeError(f"{field}: expected a function, got the text of one, read from a library: {function}")
    uses_torch = isinstance(function, Function) and function.uses_torch
    outside: list[np.ndarray] = []
    given = {name: _Input(np.asarray(array), uses_torch, outside) for name, array in inputs.items()}
    taken = _taken(source, len(ARGUMENTS) + (field == "score_mod"), given)
    with np.errstate(all="ignore"):  # as of a function that takes its 0 / 0 away again
        result = source(*(_handed(array, uses_torch) for array in arguments), **taken)
    is_outside = np.zeros((1,) * arguments[0].ndim, bool)
    for each in outside:
        is_outside = is_outside | each
    return np.asarray(result), is_outside


def _taken(source: Callable[..., Any], positions: int, given: dict[str, Any]) -> dict[str, Any]:
    """Those that a function takes by keyword, behind its arguments."""
    try:
        parameters = list(inspect.signature(source).parameters.values())
    except ValueError:  # of a function of C
        return {}
    by_position = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    filled = {each.name for each in by_position[:positions]}
    names = {each.name for each in parameters} - filled
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
    return {name: array for name, array in given.items() if name in names or (takes_all and name not in filled)}


class _Input:
    """An input as functions index it: an index outside of it is noted, and gives an element that is in it."""

    def __init__(self, array: np.ndarray, uses_torch: bool, outside: list[np.ndarray]) -> None:
        kind = bool if array.dtype == bool else np.int64 if array.dtype.kind == "i" else np.float64
        self._array, self._uses_torch, self._outside = array.astype(kind), uses_torch, outside

    def __getitem__(self, index: Any) -> Any:
        indices = [np.asarray(each) for each in (index if isinstance(index, tuple) else (index,))]
        held = []
        for each, extent in zip(indices, self._array.shape, strict=True):
            at = np.where(each < 0, each + extent, each) if each.ndim == 0 else each  # a number counts from the end
            self._outside.append((at < 0) | (at >= extent))
            held.append(np.clip(at, 0, max(extent - 1, 0)))
        return _handed(self._array[tuple(held)], self._uses_torch)


def _handed(array: np.ndarray, uses_torch: bool) -> Any:
    if not uses_torch:
        return array
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
