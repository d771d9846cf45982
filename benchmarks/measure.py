"""Rounds: every contender and the roofline probe take turns, so that a change of the machine's speed meets them all."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.contender import Contender
from benchmarks.inputs import Call, make_call
from benchmarks.peers import PEERS, Unsupported
from benchmarks.roofline import Probe, Roofline, summarise
from pa_compiler.verification.cases import Case
from pa_compiler.verification.comparison import compare, oracle

_TURN = 0.06  # seconds of a contender's turn, at least one call
_PAUSE = 0.02  # seconds until the threads of the one before have gone to sleep
_SLOW = 4.0  # a contender that takes so much longer than the fastest
_SLOW_ROUNDS = 3  # ... sits out after so many rounds, which are the fewest that there are


class Spread(NamedTuple):
    """A median over rounds with its 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Result:
    """How one contender did.

    Attributes:
        contender: Its name in PEERS.
        seconds: Of a call.
        of_limit: Its operations per second as a fraction of the roofline's.
        error: The largest error against float64, as a fraction of the bound in pa_compiler.verification.tolerances.
        to_best_peer: How many times faster than the best peer; None for peers, and where no peer runs.
        to_parts: Its time as a multiple of the added times of the case's parts; None where it has none.
        reason: Why there are no figures, or "".
    """

    contender: str
    seconds: Spread | None = None
    of_limit: Spread | None = None
    error: float | None = None
    to_best_peer: Spread | None = None
    to_parts: Spread | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """All results of a case on a number of threads."""

    name: str
    case: Case
    num_threads: int
    roofline: Roofline
    best_peer: str | None
    results: tuple[Result, ...]


_Times = dict[tuple[str, str], list[float]]
"""By case and contender: seconds of a call, a median for each of its turns."""


def measure(
    cases: Mapping[str, Case],
    contenders: Sequence[Contender],
    probe: Probe,
    cpus: Sequence[int],
    *,
    rounds: int,
    tell: Callable[[str], None],
    seconds: float = math.inf,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> list[CaseResult]:
    """Prepare every contender for some cases, time them in turns, and check what the last of the timed calls returned.

    Args:
        cases: By their names, at the sizes at which they are measured.
        contenders: Who takes part; their processes are pinned to cpus.
        probe: The roofline probe.
        cpus: A thread on each.
        rounds: Turns that each one has.
        tell: Told what is being done.
        seconds: When so many have passed there are no more rounds, except the first three.
        parts: Of a case, those of the cases whose times, added up, its own is compared with.
    """
    reasons: dict[tuple[str, str], str] = {}
    for contender in contenders:
        reasons |= _prepare(contender, cases, tell)
    able = {name: [contender for contender in contenders if (name, contender.name) not in reasons] for name in cases}
    times, rates = _take_turns(able, probe, cpus, rounds, seconds, tell)
    errors: dict[tuple[str, str], float] = {}
    for name, active in able.items():
        tell(f"{name}: checks against float64")
        errors |= _errors(name, active, make_call(cases[name], len(cpus), huge_pages=False))
    for wrong in [key for key, error in errors.items() if not error <= 1]:
        reasons[wrong] = f"wrong: {errors[wrong]:.3g} times the bound on its error"
        del times[wrong]

    roofline, of_rounds = summarise(rates)
    found = []
    for name, case in cases.items():
        peers = [peer for of, peer in times if of == name and not PEERS[peer].ours]
        best = min(peers, key=lambda peer: statistics.median(times[name, peer]), default=None)
        limits = [of_round.limit(case) for of_round in of_rounds]
        rows = []
        for key in [(name, contender.name) for contender in contenders]:
            row = Result(key[1], error=errors.get(key), reason=reasons.get(key, ""))
            of_limit = [case.flops / own / limit for own, limit in zip(times.get(key, ()), limits, strict=False)]
            rows.append(_with_times(row, key, times, of_limit, best, (parts or {}).get(name, ())))
        found.append(CaseResult(name, case, len(cpus), roofline, best, tuple(rows)))
    return found


def _with_times(
    row: Result, key: tuple[str, str], times: _Times, of_limit: Sequence[float], best: str | None, parts: Sequence[str]
) -> Result:
    """A contender's row with what its times say, if it has any. Who sits out does so from some round on."""
    if key not in times:
        return row
    (name, contender), mine = key, times[key]
    row = dataclasses.replace(row, seconds=_spread(mine), of_limit=_spread(of_limit))
    if best is not None and PEERS[contender].ours:
        ratios = [theirs / own for theirs, own in zip(times[name, best], mine, strict=False)]
        row = dataclasses.replace(row, to_best_peer=_spread(ratios))
    if parts and all((part, contender) in times for part in parts):
        apart = zip(*(times[part, contender] for part in parts), strict=False)
        row = dataclasses.replace(
            row, to_parts=_spread([own / sum(each) for own, each in zip(mine, apart, strict=False)])
        )
    return row


def _prepare(
    contender: Contender, cases: Mapping[str, Case], tell: Callable[[str], None]
) -> dict[tuple[str, str], str]:
    """Prepare a contender for all cases. Returns why not, by case and contender, where that does not go."""
    contender.forget()
    for name, case in cases.items():
        tell(f"{name}: {PEERS[contender.name].title} prepares")
        try:
            contender.prepare(name, case.batch)
        except Unsupported as reason:
            others = {other: case for other, case in cases.items() if other != name}
            found = {(name, contender.name): str(reason)}
            # Where its process has ended, the cases before this one are lost with it.
            return found | _prepare(contender, others, tell)
    return {}


def _take_turns(
    able: dict[str, list[Contender]],
    probe: Probe,
    cpus: Sequence[int],
    rounds: int,
    seconds: float,
    tell: Callable[[str], None],
) -> tuple[_Times, list[dict[str, float]]]:
    """The times of those who are able to do a case, and what the probe found in each round."""
    times: _Times = {(name, contender.name): [] for name, active in able.items() for contender in active}
    rates = []
    end = time.perf_counter() + seconds
    for index in range(rounds):
        if index >= _SLOW_ROUNDS and time.perf_counter() > end:
            break
        tell(f"{', '.join(able)}: round {index + 1} of {rounds}")
        if index == _SLOW_ROUNDS:
            able = {name: _fast_enough(name, active, times) for name, active in able.items()}
        rates.append(probe.measure(cpus))
        # The cases of one contender follow each other, since they are compared with each other too.
        for contender in {contender.name: contender for active in able.values() for contender in active}.values():
            for name in [name for name, active in able.items() if contender in active]:
                time.sleep(_PAUSE)
                times[name, contender.name].append(statistics.median(contender.time(name, _TURN)))
    return times, rates


def _fast_enough(name: str, contenders: list[Contender], times: _Times) -> list[Contender]:
    medians = {contender.name: statistics.median(times[name, contender.name]) for contender in contenders}
    limit = _SLOW * min(medians.values(), default=0.0)
    return [contender for contender in contenders if medians[contender.name] <= limit]


def _errors(name: str, contenders: Sequence[Contender], call: Call) -> dict[tuple[str, str], float]:
    """The largest error of each contender's result of a case, as a fraction of its bound."""
    rows = call.checked()
    tables = call.block_table[rows.sequence]
    caches = (call.key_cache, call.value_cache)
    expected = oracle(call.case.spec, call.query[rows.row], *caches, tables, rows.length, call.case.scale)["out"]
    errors = {}
    with tempfile.TemporaryDirectory() as directory:
        for contender in contenders:
            out = contender.result(name, Path(directory) / "out.npy")
            same_shape = out.shape == call.out_shape
            found = compare("out", out[rows.row], *expected, rows.length)[0].of_tolerance if same_shape else math.inf
            errors[name, contender.name] = found
    return errors


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(low), float(high))
