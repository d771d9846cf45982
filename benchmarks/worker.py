"""A process that holds one contender and times it when it is told to: JSON lines in, JSON lines out.

    python -m benchmarks.worker NAME

Requests: {"case", "batch", "num_threads", "huge_pages"} prepares a call and makes it once, {"seconds"} times calls for
about so long, {"save"} writes what the last call returned to a file.
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

from benchmarks.cases import ALL_CASES
from benchmarks.inputs import make_call
from benchmarks.peers import PEERS, Unsupported


def serve(name: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until the standard input ends."""
    timer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            timer = None  # frees the last case's memory
            case = dataclasses.replace(ALL_CASES[request["case"]], batch=request["batch"])
            try:
                peer = importlib.import_module(f"benchmarks.peers.{PEERS[name].module}")
                if not PEERS[name].any_values and case.spec.result_dim != case.spec.head_dim:
                    raise Unsupported("keys and values of one size alone")
                call = make_call(case, request["num_threads"], request["huge_pages"])
                timer = Timer(getattr(peer, PEERS[name].prepare)(call))
                answer({"ready": True})
            except (Unsupported, ImportError) as error:
                answer({"unsupported": str(error)})
        elif "seconds" in request:
            answer({"times": timer.time(request["seconds"])})
        else:
            np.save(request["save"], as_float32(timer.out))
            answer({"saved": True})


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
