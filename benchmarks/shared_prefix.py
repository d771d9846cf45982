"""attend_shared_prefix beside decode and attend, which read a prefix once for each sequence.

    python -m benchmarks.shared_prefix

These have the prefix's blocks in all rows of their block table, as an engine with a cache of prefixes has them, or
copies of them for each sequence, as one without. Calls are made in turns in one process, on one cache on huge pages,
and all results are compared with float64 before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.verification.comparison import compare, oracle
from pa_compiler.verification.inputs import fill, noise

ROUNDS = 15
SPECS = {
    "32/8 bfloat16 NHD": PagedAttentionSpec(32, 8, 128, 16, "bfloat16"),
    "32/8 bfloat16 packed": PagedAttentionSpec(32, 8, 128, 16, "bfloat16", kv_layout="packed"),
    "32/32 bfloat16 NHD": PagedAttentionSpec(32, 32, 128, 16, "bfloat16"),
    "32/8 float32 NHD": PagedAttentionSpec(32, 8, 128, 16, "float32"),
}


class Case(NamedTuple):
    """So many sequences with a prefix of so many tokens, and own and query tokens of each."""

    sequences: int
    prefix: int
    own: int
    query: int = 1

    @property
    def words(self) -> str:
        """Its own tokens."""
        return f"{self.own}" if self.query == 1 else f"{self.own}, {self.query} of them queries"


CASES = (Case(16, 8192, 200), Case(4, 512, 200), Case(64, 2048, 200), Case(16, 8192, 200, query=4))


class Call(NamedTuple):
    """What attend and decode are given: one for the prefix's blocks in all rows, and one for copies of them."""

    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray
    block_table: np.ndarray
    context_lens: np.ndarray
    query_start_loc: np.ndarray | None


def make_calls(module: pa_compiler.Module, case: Case) -> dict[str, Call]:
    """Draw the arrays of a case. Blocks lie in any order."""
    spec, rng = module.spec, np.random.default_rng(0)
    of_prefix, of_own = case.prefix // spec.block_size, -(-case.own // spec.block_size)
    num_blocks = case.sequences * (of_prefix + of_own)
    key_cache, value_cache = (fill(rng, cache, 1.0) for cache in module.empty_cache(num_blocks))
    copies = rng.permutation(num_blocks).astype(np.int32).reshape(case.sequences, -1)
    table = copies.copy()
    table[:, :of_prefix] = copies[0, :of_prefix]
    for cache in (key_cache, value_cache):
        for row in copies[1:]:
            cache[row[:of_prefix]] = cache[copies[0, :of_prefix]]
    lens = np.full(case.sequences, case.prefix + case.own, np.int32)
    starts = np.arange(0, (case.sequences + 1) * case.query, case.query, dtype=np.int32) if case.query > 1 else None
    query = noise(rng, (case.sequences * case.query, spec.num_heads, spec.head_dim), 1.0, spec.dtype)
    tables = {"blocks": table, "copies": copies}
    return {name: Call(query, key_cache, value_cache, each, lens, starts) for name, each in tables.items()}


def make_runs(module: pa_compiler.Module, case: Case, calls: dict[str, Call]) -> dict[str, Callable[[], np.ndarray]]:
    """The calls that are timed, by name."""
    call, out = calls["blocks"], np.empty_like(calls["blocks"].query)
    prefix = call.block_table[0, : case.prefix // module.spec.block_size].copy()
    prefix_len = np.array([case.prefix])

    def plain(call: Call) -> Any:
        return module.decode(*call[:5], out=out) if case.query == 1 else module.attend(*call, out=out)

    def shared() -> Any:
        tables = (prefix, prefix_len, call.block_table, call.context_lens, call.query_start_loc)
        return module.attend_shared_prefix(*call[:3], *tables, out=out)

    return {"shared": shared} | {name: lambda each=each: plain(each) for name, each in calls.items()}


def measure(runs: dict[str, Callable[[], np.ndarray]]) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(each) for name, each in seconds.items()}


def check(spec: PagedAttentionSpec, call: Call, runs: dict[str, Callable[[], np.ndarray]]) -> None:
    """Compare all results with float64.

    Raises:
        AssertionError: one is outside of the tolerance.
    """
    expected = oracle(spec, *call[:5], None, spec.kv_layout, query_start_loc=call.query_start_loc)
    row_lens = np.repeat(call.context_lens, len(call.query) // len(call.context_lens))
    for name, run in runs.items():
        _, wrong = compare("out", run(), *expected["out"], row_lens)
        if wrong:
            raise AssertionError(f"{name}: {wrong}")


def main() -> None:
    """Print a table for each number of threads."""
    for count in (1, len(os.sched_getaffinity(0))):
        heads = (
            "spec",
            "sequences",
            "prefix",
            "own",
            "shared, ms",
            "blocks, ms",
            "copies, ms",
            "blocks / shared",
            "copies / shared",
        )
        table = Table(*heads, title=f"{count} threads, medians of {ROUNDS} rounds (10 to 90 %)")
        for name, spec in SPECS.items():
            module = pa_compiler.compile(spec, shared_prefix=True)
            module.num_threads = count
            for case in CASES:
                calls = make_calls(module, case)
                runs = make_runs(module, case, calls)
                check(spec, calls["blocks"], runs)
                seconds = measure(runs)
                row = [name, str(case.sequences), str(case.prefix), case.words]
                row += [f"{np.median(each) * 1e3:.2f}" for each in seconds.values()]
                for other in calls:
                    low, ratio, high = np.percentile(seconds[other] / seconds["shared"], [10, 50, 90])
                    row.append(f"{ratio:.2f} ({low:.2f} to {high:.2f})")
                table.add_row(*row)
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
