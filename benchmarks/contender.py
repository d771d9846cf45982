"""A contender seen from the process that measures: a worker of its own, asked over pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import PEERS, Unsupported

_ROOT = Path(__file__).parent.parent


class Contender:
    """A worker process with one contender, pinned to CPUs and to as many threads; it ends with the with statement."""

    def __init__(self, name: str, cpus: Sequence[int], log: Path) -> None:
        self.name = name
        self._cpus = list(cpus)
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def prepare(self, case: str, cache_bytes: int, huge_pages: bool) -> None:
        """Make the case's inputs and call it once. Raises Unsupported where that cannot be done."""
        if self._process is None:
            self._start()
        settings = {"num_threads": len(self._cpus), "cache_bytes": cache_bytes, "huge_pages": huge_pages}
        answer = self._ask({"case": case, **settings})
        if "unsupported" in answer:
            raise Unsupported(answer["unsupported"])

    def time(self, seconds: float) -> list[float]:
        """The seconds of each of the calls that were made in about so long."""
        return self._ask({"seconds": seconds})["times"]

    def result(self, path: Path) -> np.ndarray:
        """What a call returns: float32 [batch, num_heads, head_dim]."""
        self._ask({"save": str(path)})
        return np.load(path)

    def _start(self) -> None:
        threads = str(len(self._cpus))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PA_NUM_THREADS": threads}
        # Threads that wait for work give the CPU back before the next contender's turn.
        environment |= {"KMP_BLOCKTIME": "10", "KMP_AFFINITY": "disabled"}
        if PEERS[self.name].preload:
            library = Path(sysconfig.get_path("data")) / "lib" / PEERS[self.name].preload
            if library.exists():
                environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("a"),
            text=True,
            cwd=_ROOT,
            env=environment,
        )
        os.sched_setaffinity(self._process.pid, self._cpus)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise Unsupported(f"its process ended: {self._reason(self._process.wait())}")
        return json.loads(line)

    def _reason(self, status: int) -> str:
        self._process = None
        if status < 0:
            return signal.strsignal(-status) or f"signal {-status}"
        lines = self._log.read_text().strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def _stop(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its standard input, which ends it
            self._process = None
