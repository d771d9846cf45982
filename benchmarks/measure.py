"""Rounds: every contender and the roofline probe take turns, so that a change of the machine's speed meets them all."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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
_SLOW_ROUNDS = 3  # ... sits out after so many rounds


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
        reason: Why there are no figures, or "".
    """

    contender: str
    seconds: Spread | None = None
    of_limit: Spread | None = None
    error: float | None = None
    to_best_peer: Spread | None = None
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


def measure(
    name: str,
    case: Case,
    contenders: Sequence[Contender],
    probe: Probe,
    cpus: Sequence[int],
    *,
    rounds: int,
    tell: Callable[[str], None],
) -> CaseResult:
    """Prepare every contender for a case, time them in turns, and check what the last of the timed calls returned.

    Args:
        name: The case's name in benchmarks.cases.
        case: The case, at its size beyond the cache.
        contenders: Who takes part; their processes are pinned to cpus.
        probe: The roofline probe.
        cpus: A thread on each.
        rounds: Turns that each one has.
        tell: Told what is being done.
    """
    reasons: dict[str, str] = {}
    for contender in contenders:
        tell(f"{name}: {PEERS[contender.name].title} prepares")
        try:
            contender.prepare(name, case.batch)
        except Unsupported as reason:
            reasons[contender.name] = str(reason)
    active = [contender for contender in contenders if contender.name not in reasons]
    times, rates = _take_turns(active, probe, cpus, rounds, lambda turn: tell(f"{name}: round {turn} of {rounds}"))
    tell(f"{name}: checks against float64")
    errors = _errors(active, make_call(case, len(cpus), huge_pages=False))
    for wrong in [contender for contender, error in errors.items() if not error <= 1]:
        reasons[wrong] = f"wrong: {errors[wrong]:.3g} times the bound on its error"
        del times[wrong]

    roofline, of_rounds = summarise(rates)
    limits = [of_round.limit(case) for of_round in of_rounds]
    peers = [peer for peer in times if not PEERS[peer].ours]
    best = min(peers, key=lambda peer: statistics.median(times[peer]), default=None)
    results = []
    for contender in contenders:
        row = Result(contender.name, error=errors.get(contender.name), reason=reasons.get(contender.name, ""))
        if contender.name in times:
            mine = times[contender.name]
            of_limit = _spread([case.flops / own / limit for own, limit in zip(mine, limits, strict=False)])
            row = dataclasses.replace(row, seconds=_spread(mine), of_limit=of_limit)
            if best is not None and PEERS[contender.name].ours:
                # Who sits out does so from some round on: the first rounds pair up.
                ratios = [theirs / own for theirs, own in zip(times[best], mine, strict=False)]
                row = dataclasses.replace(row, to_best_peer=_spread(ratios))
        results.append(row)
    return CaseResult(name, case, len(cpus), roofline, best, tuple(results))


def _take_turns(
    contenders: Sequence[Contender], probe: Probe, cpus: Sequence[int], rounds: int, tell: Callable[[int], None]
) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    """Of each contender the seconds of a call, the median of each of its turns; and what the probe found each time."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    rates = []
    for index in range(rounds):
        tell(index + 1)
        if index == _SLOW_ROUNDS:
            medians = {name: statistics.median(past) for name, past in times.items()}
            limit = _SLOW * min(medians.values(), default=0.0)
            contenders = [contender for contender in contenders if medians[contender.name] <= limit]
        rates.append(probe.measure(cpus))
        for contender in contenders:
            time.sleep(_PAUSE)
            times[contender.name].append(statistics.median(contender.time(_TURN)))
    return times, rates


def _errors(contenders: Sequence[Contender], call: Call) -> dict[str, float]:
    """The largest error of each result, as a fraction of its bound."""
    expected = oracle(call.case.spec, *call.arguments, call.case.scale)["out"]
    errors = {}
    with tempfile.TemporaryDirectory() as directory:
        for contender in contenders:
            out = contender.result(Path(directory) / "out.npy")
            errors[contender.name] = compare("out", out, *expected, call.context_lens)[0].of_tolerance
    return errors


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(low), float(high))
