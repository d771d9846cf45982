"""A program that is interrupted while it compiles, and prints as JSON what came of it.

    interrupted_compiles.py import N     at the Nth module of TVM's that is imported
    interrupted_compiles.py event N      at the Nth event that Python tells its auditors: imports, files, processes
    interrupted_compiles.py seconds S    after S seconds

Three times in a row if a third word says so. It prints the outcome of that compile ("compiled", "interrupted", or
another exception), the number of events until then, what it has left in the cache and in TMPDIR, and whether compiling
again in the same process gives what decodes right.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

import pa_compiler

SPEC = pa_compiler.PagedAttentionSpec(3, 1, 4, 2, "float32")


def interrupt(times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01 * (times > 1))


class Auditor:
    """Interrupts at a number of events of a kind."""

    def __init__(self, kind: str, at: int, times: int) -> None:
        self.kind, self.at, self.times, self.count = kind, at, times, 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.kind == "import" and not (event == "import" and str(arguments[0]).startswith("tvm.")):
            return
        self.count += 1
        if self.count == self.at:
            interrupt(self.times)


def outcome() -> str:
    try:
        pa_compiler.compile(SPEC)
    except KeyboardInterrupt:
        return "interrupted"
    except BaseException as error:
        return repr(error)
    return "compiled"


def is_right() -> bool:
    values = np.arange(8, dtype="f4").reshape(1, 2, 1, 4)
    module = pa_compiler.compile(SPEC)
    out = module.decode(np.ones((1, 3, 4), "f4"), values, values, np.zeros((1, 1), "i4"), np.ones(1, "i4"))
    return bool((out == values[0, 0]).all())


def main(kind: str, at: str, times: str = "1") -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    auditor = Auditor(kind, 0 if kind == "seconds" else int(at), int(times))
    if kind == "seconds":
        threading.Timer(float(at), interrupt, (int(times),)).start()
    sys.addaudithook(auditor)
    result = outcome()
    auditor.at, events = 0, auditor.count
    left = [path.name for path in Path(os.environ["PA_CACHE_DIR"]).glob("*") if not path.name.endswith(".lock")]
    left += os.listdir(os.environ["TMPDIR"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that comes after it was compiled
    print(json.dumps({"outcome": result, "events": events, "left": left, "right": is_right()}))


main(*sys.argv[1:])
