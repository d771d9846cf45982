"""A process that holds one contender and times it when it is told to: JSON lines in, JSON lines out.

    python -m benchmarks.worker NAME

Requests: {"case", "batch", "num_threads", "huge_pages"} prepares a call and makes it once, beside those of other cases;
{"time", "seconds"} times a case's calls for about so long; {"save", "path"} writes what a case's last call returned
to a file; {"forget"} frees all cases.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.attend_cases import ATTEND_CASES
from benchmarks.cases import ALL_CASES
from benchmarks.inputs import make_call
from benchmarks.peers import PEERS, Unsupported


def serve(name: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until the standard input ends."""
    timers: dict[str, Timer] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            try:
                timers[request["case"]] = prepared(name, request)
                answer({"ready": True})
            except (Unsupported, ImportError) as error:
                answer({"unsupported": str(error)})
        elif "time" in request:
            answer({"times": timers[request["time"]].time(request["seconds"])})
        elif "save" in request:
            np.save(request["path"], as_float32(timers[request["save"]].out))
            answer({"saved": True})
        else:
            timers.clear()
            answer({"forgotten": True})


def prepared(name: str, request: dict[str, Any]) -> Timer:
    """The contender's call of a case, made once. Raises Unsupported, or ImportError."""
    case = dataclasses.replace((ALL_CASES | ATTEND_CASES)[request["case"]], batch=request["batch"])
    peer = PEERS[name]
    module = importlib.import_module(f"benchmarks.peers.{peer.module}")
    if not peer.any_values and case.spec.result_dim != case.spec.head_dim:
        raise Unsupported("keys and values of one size alone")
    if not peer.ragged and case.query_lens is not None:
        raise Unsupported("one query token of each sequence alone")
    return Timer(getattr(module, peer.prepare)(make_call(case, request["num_threads"], request["huge_pages"])))


class Timer:
    """A prepared call with what it returned last."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.out = run()

    def time(self, seconds: float) -> list[float]:
        """Call it until so many seconds are over, at least once; the seconds of each call.

        The first call brings the processor up to speed and is not counted, unless it took the whole time.
        """
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            self.out = self._run()
            times.append(time.perf_counter() - start)
        return times[1:] or times


def as_float32(out: Any) -> np.ndarray:
    """A contender's result, a NumPy array or a torch tensor, in float32."""
    if not isinstance(out, np.ndarray):
        out = out.float().numpy()
    return np.asarray(out).astype(np.float32)


if __name__ == "__main__":
    # Libraries print to the standard output: answers go to a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], lambda reply: print(json.dumps(reply), file=answers, flush=True))
