"""What score functions and a window cost: each beside a plain call, in turns, on one thread, every result checked.

    python -m benchmarks.scores [ROUNDS]

A soft cap, ALiBi, sinks, functions and a mask are measured on the arrays of the plain call. A window of 1024 in a
context of 32768 is measured beside a context of 1024, on the same blocks: the entries of its block table before the
window are -1, as where an engine has freed those blocks. Keys and values exceed the last-level cache. A row has the
median of a call's time in all rounds, and its ratio to the plain call of the same round, with the 10th and the 90th
percentile.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import pa_compiler
from benchmarks.cases import CASES, beyond_cache
from benchmarks.inputs import Call, make_call
from pa_compiler.prediction.rates import last_level_cache
from pa_compiler.verification import cases
from pa_compiler.verification.comparison import compare, oracle


def distance(score: Any, batch: Any, head: Any, query_pos: Any, key_pos: Any) -> Any:
    """ALiBi written as a function: a bias by the distance, with a slope for each head."""
    return score - (head + 1) * 0.0625 * (query_pos - key_pos)


def sigmoid_gate(score: Any, batch: Any, head: Any, query_pos: Any, key_pos: Any) -> Any:
    """A function with an exponential and a division."""
    return score / (1 + np.exp(-score))


def every_other(batch: Any, head: Any, query_pos: Any, key_pos: Any) -> Any:
    """A mask that has no bounds."""
    return (query_pos - key_pos) % 2 == 0


CASE_NAMES = ("32/8-bf16", "32/8-f32", "16/1-bf16", "16/1-f32")
FUNCTIONS: dict[str, dict[str, Any]] = {
    "soft cap": {"softcap": 50.0},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
    "all three": {"softcap": 50.0, "alibi": True, "sinks": True},
    "score_mod, a bias": {"score_mod": distance},
    "score_mod, a gate": {"score_mod": sigmoid_gate},
    "mask_mod, every other": {"mask_mod": every_other},
}
WINDOW, CONTEXT = 1024, 32768
TURN = 0.1  # seconds, at least three calls


def with_fields(call: Call, **fields: Any) -> Call:
    """The same arrays for another spec of the same shape."""
    case = dataclasses.replace(call.case, spec=dataclasses.replace(call.case.spec, **fields))
    return dataclasses.replace(call, case=case)


def in_a_longer_context(call: Call) -> Call:
    """The call's tokens as the last ones of CONTEXT, with a window that is as long as the call's sequences."""
    batch, size = len(call.context_lens), call.case.spec.block_size
    table = np.full((batch, CONTEXT // size), -1, np.int32)
    table[:, -(WINDOW // size) :] = call.block_table[:, : WINDOW // size]
    longer = with_fields(call, window=WINDOW)
    return dataclasses.replace(longer, block_table=table, context_lens=np.full(batch, CONTEXT, np.int32))


def prepared(call: Call) -> Callable[[], object]:
    """What makes a call, on one thread, when one was compared with float64.

    Raises:
        AssertionError: its result is outside of the tolerance.
    """
    spec = call.case.spec
    heads: dict[str, Any] = cases.head_arrays(call.case)
    module = pa_compiler.compile(spec)
    module.num_threads = 1
    out = np.empty(call.out_shape, spec.result_dtype)
    module.decode(*call.arguments, out=out, **heads)
    expected = oracle(spec, *call.arguments, None, "NHD", lambda sequences: None, **heads)
    _, wrong = compare("out", out, *expected["out"], call.context_lens)
    if wrong:
        raise AssertionError(f"{spec}: {wrong}")
    return lambda: module.decode(*call.arguments, out=out, **heads)


def measured(calls: dict[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a call by name, a median for each round."""
    runs = {name: prepared(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times: list[float] = []
            end = time.perf_counter() + TURN
            while len(times) < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            seconds[name].append(float(np.median(times)))
    return {name: np.array(each) for name, each in seconds.items()}


def main() -> None:
    """Measure, and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    console, cache_bytes = Console(), last_level_cache()
    table = Table("case", "call", "ms", "ratio", "10 % to 90 %", title=f"one thread, medians of {rounds} rounds")
    for name in CASE_NAMES:
        plain = make_call(beyond_cache(CASES[name], cache_bytes), 1, huge_pages=True)
        short = dataclasses.replace(CASES[name], seq_lens=(WINDOW,))
        recent = make_call(beyond_cache(short, cache_bytes), 1, huge_pages=True)
        functions = {title: with_fields(plain, **fields) for title, fields in FUNCTIONS.items()}
        windows = {f"window {WINDOW} of {CONTEXT}": in_a_longer_context(recent)}
        for first, of_first, others in (("plain", plain, functions), (f"context {WINDOW}", recent, windows)):
            console.print(f"{name}, {first} ...")
            seconds = measured({first: of_first} | others, rounds)
            for title, times in seconds.items():
                low, ratio, high = np.percentile(times / seconds[first], [10, 50, 90])
                row = (f"{np.median(times) * 1e3:.3f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
                table.add_row(name, title, *row)
    console.print(table)


if __name__ == "__main__":
    main()
