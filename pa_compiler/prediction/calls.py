"""Calls of decode on one thread: predicted, and measured.

A call on keys and values in memory is predicted from one on keys and values in the second-level cache, which takes what
its instructions take, and from the order in which it reads lines. A probe without the kernel reads lines of memory in
that order, fetches those that the call's instructions fetch as far ahead, and has products beside each line for as
long as the instructions that read take for it in the cache: how both overlap is the machine's affair. What the others
take, such as those of the softmax, is added. Nothing is fitted.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pa_compiler.prediction.order import LINE, Order, order
from pa_compiler.prediction.rates import Rates, last_level_cache, second_level_cache
from pa_compiler.prediction.trace import Recorder
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case, Inputs
from pa_compiler.verification.codes import scale_arrays

_ROUNDS, _TURN, _LEAST = 4, 0.08, 3
_BEYOND = 2
"""Times as large as the last-level cache: what calls in turn read, so that each reads from memory."""
_WITHIN = 2
"""Times as small as the second-level cache: what a call that stays there reads, again and again."""


class Call(NamedTuple):
    """A call of a module, of which each turn reads other blocks of the same caches.

    Attributes:
        module: What is called, on one thread.
        case: The size of the call.
        turns: The arguments of each turn; they differ in block_table.
        near: Arguments whose sequences have the same few blocks in turn, which stay in the second-level cache.
        heads: The keywords of all.
    """

    module: Any
    case: Case
    turns: Sequence[Inputs]
    near: Inputs
    heads: dict[str, Any]

    def run(self, turn: int, out: Any = None) -> Any:
        """Call once."""
        return cases.call(self.module, self.case, self.turns[turn % len(self.turns)], out, **self.heads)

    def run_near(self, out: Any = None) -> Any:
        """Call once on what stays in the second-level cache."""
        return cases.call(self.module, self.case, self.near, out, **self.heads)


class Times(NamedTuple):
    """Seconds of a call in the second-level cache, of its lines from memory alone, and of both as they overlap."""

    near: float
    memory: float
    whole: float


class Measured(NamedTuple):
    """Medians of rounds in which all of it takes turns.

    Attributes:
        seconds: Of a call on one thread.
        times: How many calls.
        operations: Float32 operations a second of the core; None without a compiler.
        predicted: What was predicted; None where the call's order is not known.
    """

    seconds: float
    times: int
    operations: float | None
    predicted: Times | None


def unknown(module: Any, case: Case) -> str:
    """What keeps the order in which a call reads from being written down; "" where nothing does."""
    if case.query_lens is not None:
        return "the order of lines is that of calls of decode, and not of attend"
    if not module.sources:
        return "the order of lines is written down by the machine code as text, which a loaded module has not"
    if platform.machine() != "x86_64":
        return (
            f"the order of lines is written down by machine code for x86-64, and this machine is {platform.machine()}"
        )
    return ""


def prepared(module: Any, case: Case, seed: int = 0) -> Call:
    """Arguments for a call, on random caches of so many turns that they are larger than the last-level cache."""
    count = -(-_BEYOND * last_level_cache() // max(case.cache_bytes, 1))
    lens = tuple(case.context_lens.tolist())
    many = dataclasses.replace(case, batch=case.batch * count, seq_lens=lens, query_lens=None)
    caches = module.empty_cache(many.num_blocks)
    arrays = cases.make_inputs(dataclasses.replace(case, max_model_len=None), seed, caches=caches)
    turns = [arrays._replace(block_table=table) for table in np.split(cases.distinct_blocks(many, seed), count)]
    blocks = max(1, second_level_cache() // _WITHIN // (case.spec.block_size * case.spec.token_bytes))
    columns = np.arange(turns[0].block_table.shape[1], dtype=turns[0].block_table.dtype)
    near = arrays._replace(block_table=np.where(turns[0].block_table < 0, -1, columns % min(blocks, many.num_blocks)))
    scales = scale_arrays(np.random.default_rng((2, seed)), case.spec, many.num_blocks)
    return Call(module, case, turns, near, cases.head_arrays(case, seed) | scales)


def ordered(call: Call) -> Order:
    """The order in which a call reads the lines of its caches; no time is measured.

    That of one of its sequences stands for all: half of the tokens are of sequences that are no longer.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    lens = call.case.context_lens
    by_length = np.argsort(lens, kind="stable")
    one = int(by_length[np.searchsorted(np.cumsum(lens[by_length]), lens.sum() / 2)])
    case = dataclasses.replace(call.case, batch=1, seq_lens=(int(lens[one]),), max_model_len=None)
    alone = {name: getattr(call.turns[0], name)[one : one + 1] for name in ("query", "block_table", "context_lens")}
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(call.module, Path(directory))
        call._replace(module=recorder.module, case=case, turns=[call.turns[0]._replace(**alone)]).run(0)
        trace = recorder.trace()
    caches = [each for each in call.turns[0][1:3] if each is not None]
    return order(trace, caches, second_level_cache())


def measured(call: Call, rates: Rates | None, lines: Order | None) -> Measured:
    """Time a call on one thread, and what it is predicted from between its turns."""
    before, call.module.num_threads = call.module.num_threads, 1
    try:
        out = call.run(0)
        times, rounds = 0, []
        for _ in range(_ROUNDS):
            operations = rates.operations() if rates else 0.0
            predicted = _predicted(call, out, rates, lines) if rates and lines and len(lines.loaded) else None
            seconds, count = _seconds(lambda number: call.run(number, out), times)
            times += count
            rounds.append((seconds, operations, *(predicted or (0.0, 0.0, 0.0))))
    finally:
        call.module.num_threads = before
    seconds, operations, *parts = (statistics.median(each) for each in zip(*rounds, strict=True))
    return Measured(seconds, times, operations or None, Times(*parts) if all(parts) else None)


def _predicted(call: Call, out: Any, rates: Rates, lines: Order) -> Times:
    """Measure what a call is predicted from. An order may be of a part of the call: it stands for all of it."""
    near, _ = _seconds(lambda _: call.run_near(out))
    of_all = call.case.kv_bytes / (len(lines.loaded) * LINE)
    busy = lines.share * near * LINE / call.case.kv_bytes
    memory, reading = (of_all * rates.reading(lines, seconds) for seconds in (0.0, busy))
    return Times(near, memory, reading + (1 - lines.share) * near)


def _seconds(run: Callable[[int], Any], before: int = 0) -> tuple[float, int]:
    """The median of some calls, each with its number after those before, and how many they were."""
    found: list[float] = []
    while sum(found) < _TURN or len(found) < _LEAST:
        start = time.perf_counter()
        run(before + len(found) + 1)
        found.append(time.perf_counter() - start)
    return statistics.median(found), len(found)
