"""A process that holds one contender and times it when it is told to: JSON lines in, JSON lines out.

    python -m benchmarks.worker NAME

Requests: {"case", "num_threads", "huge_pages"} prepares a call, {"seconds"} times calls for about so long, {"save"}
writes the result of a call to a file.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import CASES, MORE_CASES, beyond_cache
from benchmarks.inputs import make_call
from benchmarks.peers import PEERS, Unsupported


def serve(name: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until the standard input ends."""
    run: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            run = None  # frees the last case's memory
            case = beyond_cache({**CASES, **MORE_CASES}[request["case"]], request["cache_bytes"])
            try:
                peer = importlib.import_module(f"benchmarks.peers.{PEERS[name].module}")
                call = make_call(case, request["num_threads"], request["huge_pages"])
                run = getattr(peer, PEERS[name].prepare)(call)
                run()
                answer({"ready": True})
            except (Unsupported, ImportError) as error:
                answer({"unsupported": str(error)})
        elif "seconds" in request:
            assert run is not None
            answer({"times": timed(run, request["seconds"])})
        else:
            assert run is not None
            np.save(request["save"], as_float32(run()))
            answer({"saved": True})


def timed(run: Callable[[], Any], seconds: float) -> list[float]:
    """Call run until so many seconds are over, at least once; the seconds of each call.

    The first call brings the processor up to speed and is not counted, unless it took the whole time.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
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
