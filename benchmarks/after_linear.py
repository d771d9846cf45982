"""Attention as a step of a model: each call of decode comes right after a linear layer of torch.

    python -m benchmarks.after_linear

An OpenMP runtime keeps its threads spinning for a while after torch has used them. Whatever else wants the CPUs then,
such as a pool of threads of decode's own, shares them with the spinning ones. Ours runs on OpenMP's team ("auto") and
on its own threads ("own"), vLLM's kernel on OpenMP's team, all in the same loop in one process: once with the libgomp
that torch brings, and once with Intel's libiomp5, which is preloaded.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import pa_compiler
from benchmarks.cases import CASES, beyond_cache
from benchmarks.contender import preloaded
from benchmarks.inputs import Call, make_call
from benchmarks.peers import Unsupported
from benchmarks.worker import as_float32
from pa_compiler.prediction.rates import last_level_cache
from pa_compiler.verification.comparison import compare, oracle

RUNTIMES = {"libgomp": None, "libiomp5": "libiomp5.so"}
"""OpenMP runtimes, each with the library that has to be preloaded for it."""

CASE_NAMES = ("32/8-bf16", "32/8-f32", "16/1-bf16")
WIDTH = 4096  # of the linear layer, in and out
ROUNDS, TURNS = 15, 8


def contenders(call: Call) -> dict[str, Callable[[], Any]]:
    """The calls that are timed, by name, each on call.num_threads threads."""
    runs: dict[str, Callable[[], Any]] = {}
    for threading in ("auto", "own"):
        module = pa_compiler.compile(call.case.spec)
        module.num_threads, module.threading = call.num_threads, threading
        out = np.empty_like(call.query)
        runs[threading] = lambda module=module, out=out: module.decode(*call.arguments, out=out)  # type: ignore[misc]
    try:
        from benchmarks.peers import vllm_cpu

        runs["vllm"] = vllm_cpu.prepare(call)
    except (ImportError, Unsupported) as error:
        print(f"vllm sits out: {error}", file=sys.stderr)
    return runs


def measure(name: str) -> dict[str, list[float]]:
    """Seconds of attention after a linear layer, by contender and number of threads: a median for each round."""
    import torch

    case = beyond_cache(CASES[name], last_level_cache())
    most = len(os.sched_getaffinity(0))
    linear = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=getattr(torch, case.spec.dtype)).requires_grad_(False)
    hidden = torch.ones(case.batch, WIDTH, dtype=linear.weight.dtype)
    calls = {count: make_call(case, count, huge_pages=True) for count in (1, most)}
    runs = {(who, count): run for count, call in calls.items() for who, run in contenders(call).items()}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    outs: dict[tuple[str, int], Any] = {}
    for _ in range(ROUNDS):
        for (who, count), run in runs.items():
            times = []
            for _ in range(TURNS):
                torch.set_num_threads(most)
                linear(hidden)
                torch.set_num_threads(count if who == "vllm" else most)
                start = time.perf_counter()
                outs[who, count] = run()
                times.append(time.perf_counter() - start)
            seconds[who, count].append(float(np.median(times)))
    check(calls[1], outs)
    return {f"{who} {count}": seconds[who, count] for who, count in sorted(seconds)}


def check(call: Call, outs: dict[tuple[str, int], Any]) -> None:
    """Compare what every contender returned last with float64.

    Raises:
        AssertionError: one is outside of the tolerance.
    """
    expected = oracle(call.case.spec, *call.arguments)
    for who, out in outs.items():
        _, wrong = compare("out", as_float32(out), *expected["out"], call.context_lens)
        if wrong:
            raise AssertionError(f"{who}: {wrong}")


def main() -> None:
    """Measure in a process for each runtime, and print a table for each case."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    console = Console()
    for name in CASE_NAMES:
        table = Table("runtime", "kernels", "1 thread, ms", "all, ms", "1 / all", "10 % to 90 %", title=name)
        for runtime, library in RUNTIMES.items():
            environment = dict(os.environ) | preloaded(library)
            command = [sys.executable, "-m", "benchmarks.after_linear", name]
            console.print(f"{name}, {runtime} ...")
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            for who, of_who in itertools.groupby(found, lambda key: key.split()[0]):
                one, every = (np.array(found[key]) for key in of_who)
                low, ratio, high = np.percentile(one / every, [10, 50, 90])
                row = (f"{np.median(one) * 1e3:.2f}", f"{np.median(every) * 1e3:.2f}", f"{ratio:.2f}")
                table.add_row(runtime, who, *row, f"{low:.2f} to {high:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
