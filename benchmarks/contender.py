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
    """A worker process with one contender, pinned to CPUs and to as many threads; it ends with the with statement.

    Attributes:
        name: The contender's in PEERS.
    """

    def __init__(self, name: str, cpus: Sequence[int], huge_pages: bool, log: Path) -> None:
        self.name = name
        self._cpus = list(cpus)
        self._huge_pages = huge_pages
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def forget(self) -> None:
        """Free the memory of all cases that were prepared."""
        if self._process is not None:
            self._ask({"forget": True})

    def prepare(self, case: str, batch: int) -> None:
        """Make the inputs of a case with so many sequences and call it once, beside those prepared before.

        Raises Unsupported where that fails.
        """
        if self._process is None:
            self._start()
        answer = self._ask(
            {"case": case, "batch": batch, "num_threads": len(self._cpus), "huge_pages": self._huge_pages}
        )
        if "unsupported" in answer:
            raise Unsupported(answer["unsupported"])

    def time(self, case: str, seconds: float) -> list[float]:
        """The seconds of each of the calls that were made in about so long."""
        return self._ask({"time": case, "seconds": seconds})["times"]

    def result(self, case: str, path: Path) -> np.ndarray:
        """What the case's last call returned: float32 [query tokens, num_heads, value_dim]."""
        self._ask({"save": case, "path": str(path)})
        return np.load(path)

    def _start(self) -> None:
        threads = str(len(self._cpus))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PA_NUM_THREADS": threads}
        # Threads that wait for work give the CPU back before the next contender's turn.
        environment |= {"KMP_BLOCKTIME": "10", "KMP_AFFINITY": "disabled"}
        environment |= preloaded(PEERS[self.name].preload)
        command = [sys.executable, "-m", "benchmarks.worker", self.name]
        pipe = subprocess.PIPE
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=_ROOT, env=environment
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
            raise Unsupported(f"its process ended: {self._reason(self._stop())}")
        return json.loads(line)

    def _reason(self, status: int) -> str:
        if status < 0:
            return signal.strsignal(-status) or f"signal {-status}"
        lines = self._log.read_text().strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def _stop(self) -> int:
        """End the process, if there is one, and return its exit status."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.communicate()  # closes its standard input, which ends it
        return process.returncode


def preloaded(name: str | None) -> dict[str, str]:
    """What preloads a library of this Python's environment, for the environment of a process; empty without it."""
    library = Path(sysconfig.get_path("data")) / "lib" / (name or "")
    return {"LD_PRELOAD": str(library)} if library.is_file() else {}
