"""Module.verify: a built module against the float64 reference, on random calls that its spec allows.

The oracle sees the keys and values as they were drawn, in NHD, and the module what append_kv or convert_cache made of
them: so both of these are verified too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from pa_compiler.layout import convert_cache
from pa_compiler.runtime.arguments import whole_number
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import draws
from pa_compiler.verification.appending import append_drawn
from pa_compiler.verification.comparison import Errors, compare, oracle
from pa_compiler.verification.draws import Draw, inside
from pa_compiler.verification.inputs import as_pair
from pa_compiler.verification.merging import merge_drawn

_CACHES = ("key_cache", "value_cache")


class Verifiable(Protocol):
    """What verify() needs of a Module."""

    spec: PagedAttentionSpec
    num_threads: int

    most_query_tokens: int | None

    @property
    def has_attend(self) -> bool:
        """As Module.has_attend."""

    @property
    def has_attend_shared_prefix(self) -> bool:
        """As Module.has_attend_shared_prefix."""

    @property
    def has_merge_states(self) -> bool:
        """As Module.has_merge_states."""

    def attend(self, *arguments: Any, **options: Any) -> Any:
        """As Module.attend."""

    def attend_shared_prefix(self, *arguments: Any, **options: Any) -> Any:
        """As Module.attend_shared_prefix."""

    def merge_states(self, *arguments: Any, **options: Any) -> Any:
        """As Module.merge_states."""

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """As Module.decode."""

    def append_kv(self, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any) -> None:
        """As Module.append_kv."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A draw whose result is wrong, and in what way."""

    seed: int
    draw: int
    message: str

    @property
    def reproduction(self) -> str:
        """The line that draws it again."""
        return f"module.verify(seed={self.seed}, draw={self.draw})"


@dataclasses.dataclass(frozen=True)
class Verification:
    """What verify() found.

    Attributes:
        seed: Of all draws.
        draws: How many calls were made and compared.
        seconds: How long it took.
        out: The largest errors of out in all draws, the absolute one in units of its call's largest value.
        lse: The largest errors of lse. Scores are huge in some draws, and so may be its absolute error.
        failures: The draws that failed, in order.
    """

    seed: int
    draws: int
    seconds: float
    out: Errors
    lse: Errors
    failures: tuple[Failure, ...]

    @property
    def passed(self) -> bool:
        """Whether no draw failed."""
        return not self.failures


def verify(
    module: Verifiable,
    seconds: float = 10,
    *,
    seed: int | None = None,
    draw: int | None = None,
    advance: Callable[[int], object] = lambda milliseconds: None,
) -> Verification:
    """As Module.verify. It sets module.num_threads as it goes.

    Raises:
        TypeError, ValueError: a bad argument.
        RuntimeError: this CPU cannot run the module.
    """
    _check(seconds, seed, draw)
    seed = secrets.randbits(32) if seed is None else seed
    first = draw or 0
    failures, found = [], [{"out": Errors(0.0, 0.0), "lse": Errors(0.0, 0.0)}]
    start = now = time.monotonic()
    for number in itertools.count(first):
        attends = (module.has_attend, module.has_attend_shared_prefix, module.most_query_tokens)
        call = draws.draw(module.spec, seed, number, *attends)
        errors, wrong = _run(module, call)
        found.append(errors)
        if module.has_merge_states:
            errors, of_merge = merge_drawn(module, seed, number)
            found.append(errors)
            wrong = wrong + of_merge
        if wrong:
            failures.append(Failure(seed, number, "; ".join(wrong)))
        before, now = now, time.monotonic()
        advance(round(1000 * (now - before)))
        if draw is not None or now - start >= seconds:
            break
    out, lse = (Errors(*map(max, zip(*(one[name] for one in found if name in one), strict=True))) for name in found[0])
    return Verification(seed, number - first + 1, now - start, out, lse, tuple(failures))


def _check(seconds: float, seed: int | None, draw: int | None) -> None:
    if not isinstance(seconds, numbers.Real) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: expected a number from 0 on, got {seconds!r}")
    for name, value in (("seed", seed), ("draw", draw)):
        if value is not None:
            whole_number(name, value, 0)
    if draw is not None and seed is None:
        raise ValueError(f"seed: expected the seed of draw {draw}, got None")


def _run(module: Verifiable, call: Draw) -> tuple[dict[str, Errors], list[str]]:
    """Make one call. Returns the errors of its results by name, and what is wrong, in words."""
    spec = module.spec
    module.num_threads = call.num_threads
    values = None if spec.shared_kv else call.values
    converted = convert_cache(call.keys, values, "NHD", spec.kv_layout)
    back = convert_cache(converted[0], converted[1], spec.kv_layout, "NHD")
    wrong = _differences("of convert_cache there and back", back, (call.keys, values))
    key_cache, value_cache = _in_one_buffer(*converted) if call.one_buffer else _copies(converted)
    rows = call.query.shape[:2]
    out, whole_out = inside(np.full((*rows, spec.result_dim), np.nan, spec.result_dtype), np.nan, call.rng)
    lse, whole_lse = inside(np.full(rows, np.nan, np.float32), np.nan, call.rng)
    kind, arrays, options = _told(spec, call, key_cache, value_cache)
    try:
        if call.append:
            wrong += append_drawn(module, call, key_cache, value_cache)
            wrong += _differences("after append_kv", (key_cache, value_cache), converted)
        inputs = _inputs(arrays | call.heads | options)
        before = _copies(inputs.values())
        returned = getattr(module, kind)(
            *arrays.values(),
            call.scale,
            out if call.give_out else None,
            lse=lse if call.lse == "given" else None,
            return_lse=call.lse != "none",
            **call.heads,
            **options,
        )
    except (IndexError, TypeError, ValueError) as error:
        return {}, [*wrong, f"raised {type(error).__name__}: {error}"]
    results = dict(zip(("out", "lse"), returned if call.lse != "none" else (returned,), strict=False))
    errors, messages = _compared(spec, call, values, results)
    wrong += messages
    wrong += _differences(f"after {kind}", inputs.values(), before, inputs)
    for name, view, whole in (("out", out, whole_out), ("lse", lse, whole_lse)):
        view.fill(np.nan)
        if not np.isnan(whole).all():
            wrong.append(f"{name}: {np.sum(~np.isnan(whole))} elements beside the array that was given were written")
    return errors, wrong


def _told(
    spec: PagedAttentionSpec, call: Draw, key_cache: np.ndarray, value_cache: np.ndarray | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Which function a draw calls, with which arrays in its order, by name, and what it is told by keyword."""
    kind, table = "decode", call.block_table
    options: dict[str, Any] = {}
    arrays: dict[str, Any] = {"query": call.query, "key_cache": key_cache, "value_cache": value_cache}
    if call.prefixes is not None:
        told = call.prefixes
        kind, table, options = "attend_shared_prefix", told.block_table, {"prefix_start_loc": told.prefix_start_loc}
        arrays |= {"prefix_table": told.prefix_table, "prefix_len": told.prefix_len}
    elif call.queries is not None:
        kind, options = "attend", {"causal": call.queries.causal, "tree_mask": call.queries.tree_mask}
    arrays["block_table"] = as_pair(table, call.context_lens, spec.block_size) if call.as_pair else table
    arrays["context_lens"] = call.context_lens
    if call.queries is not None:
        arrays["query_start_loc"] = call.queries.query_start_loc
    return kind, arrays, options


def _inputs(given: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """All arrays among what a call is given, by the names that errors have for them."""
    arrays: dict[str, np.ndarray | None] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            arrays |= {f"{name}[{i}]": array for i, array in enumerate(value)}
        elif not isinstance(value, bool):
            arrays |= value if isinstance(value, dict) else {name: value}
    return arrays


def _compared(
    spec: PagedAttentionSpec, call: Draw, values: np.ndarray | None, results: dict[str, np.ndarray]
) -> tuple[dict[str, Errors], list[str]]:
    """The errors of a call's results by name, and what is wrong with them."""
    arrays = (call.query, call.keys, values, call.block_table, call.context_lens)
    options, row_lens = call.heads, call.context_lens
    if call.queries is not None:
        options = options | vars(call.queries)
        row_lens = np.repeat(row_lens, call.queries.counts)
    expected = oracle(spec, *arrays, call.scale, "NHD", lambda sequences: None, **options)
    values_drawn = call.values if call.new is None else call.new[1]
    values_seen = np.abs(values_drawn[call.is_used].astype(np.float64))
    largest = float(values_seen[~np.isnan(values_seen)].max(initial=0)) or 1.0
    errors, wrong = {}, []
    for name, result in results.items():
        found, message = compare(name, result, *expected[name], row_lens)
        unit = largest if name == "out" else 1.0
        errors[name] = found._replace(absolute=found.absolute / unit)
        wrong += [message] if message else []
    return errors, wrong


def _copies(arrays: Iterable[np.ndarray | None]) -> list[Any]:
    return [None if array is None else array.copy() for array in arrays]


def _in_one_buffer(key_cache: np.ndarray, value_cache: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Copies of both caches as views of one array, in which each block of keys is followed by that of values.

    Both begin at even elements, as pairs of bfloat16 have to.
    """
    if value_cache is None:
        return key_cache.copy(), None
    key_width, value_width = (math.prod(cache.shape[1:]) for cache in (key_cache, value_cache))
    values_at = key_width + key_width % 2
    both = np.zeros((len(key_cache), values_at + value_width + value_width % 2), key_cache.dtype)
    keys = both[:, :key_width].reshape(key_cache.shape)
    values = both[:, values_at : values_at + value_width].reshape(value_cache.shape)
    keys[...], values[...] = key_cache, value_cache
    return keys, values


def _differences(
    when: str,
    actual: Iterable[np.ndarray | None],
    expected: Iterable[np.ndarray | None],
    names: Iterable[str] = _CACHES,
) -> list[str]:
    """What is said of arrays whose bits are not as expected."""
    return [
        f"{name}: its bits are not as expected {when}"
        for name, one, other in zip(names, actual, expected, strict=True)
        if (None if one is None else one.tobytes()) != (None if other is None else other.tobytes())
    ]
