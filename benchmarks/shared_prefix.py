"""attend_shared_prefix beside decode and attend, which read a prefix once for each sequence.

    python -m benchmarks.shared_prefix

Both read the same blocks of one cache on huge pages: the prefix's blocks are in all rows of the block table. Calls are
made in turns in one process, and both results are compared with float64 before.
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


CASES = (Case(16, 8192, 200), Case(4, 512, 200), Case(64, 2048, 200), Case(16, 8192, 200, query=4))


class Calls(NamedTuple):
    """The two calls of a case, and what they are given."""

    without: Callable[[], np.ndarray]
    shared: Callable[[], np.ndarray]
    arrays: tuple[np.ndarray, ...]
    query_start_loc: np.ndarray | None


def make_calls(module: pa_compiler.Module, case: Case) -> Calls:
    """Draw the arrays of a case. Blocks lie in any order."""
    spec, rng = module.spec, np.random.default_rng(0)
    of_prefix, of_own = case.prefix // spec.block_size, -(-case.own // spec.block_size)
    num_blocks = of_prefix + case.sequences * of_own
    key_cache, value_cache = (fill(rng, cache, 1.0) for cache in module.empty_cache(num_blocks))
    blocks = rng.permutation(num_blocks).astype(np.int32)
    table = np.empty((case.sequences, of_prefix + of_own), np.int32)
    table[:, :of_prefix], table[:, of_prefix:] = blocks[:of_prefix], blocks[of_prefix:].reshape(case.sequences, -1)
    lens = np.full(case.sequences, case.prefix + case.own, np.int32)
    starts = np.arange(0, (case.sequences + 1) * case.query, case.query, dtype=np.int32) if case.query > 1 else None
    query = noise(rng, (case.sequences * case.query, spec.num_heads, spec.head_dim), 1.0, spec.dtype)
    out = np.empty((*query.shape[:2], spec.result_dim), query.dtype)
    prefix, prefix_len = blocks[:of_prefix].copy(), np.array([case.prefix])

    def without() -> Any:
        if starts is None:
            return module.decode(query, key_cache, value_cache, table, lens, out=out)
        return module.attend(query, key_cache, value_cache, table, lens, starts, out=out)

    def shared() -> Any:
        tables = (prefix, prefix_len, table, lens, starts)
        return module.attend_shared_prefix(query, key_cache, value_cache, *tables, out=out)

    return Calls(without, shared, (query, key_cache, value_cache, table, lens), starts)


def measure(calls: Calls) -> np.ndarray:
    """Seconds [rounds, 2] of the calls in turns."""
    seconds = []
    for _ in range(ROUNDS):
        times = []
        for call in (calls.without, calls.shared):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        seconds.append(times)
    return np.array(seconds)


def check(spec: PagedAttentionSpec, calls: Calls) -> None:
    """Compare both results with float64.

    Raises:
        AssertionError: one is outside of the tolerance.
    """
    query, key_cache, value_cache, table, lens = calls.arrays
    of = (spec, query, key_cache, value_cache, table, lens, None, spec.kv_layout)
    expected = oracle(*of, query_start_loc=calls.query_start_loc)
    for name, call in (("without", calls.without), ("shared", calls.shared)):
        _, wrong = compare("out", call(), *expected["out"], np.repeat(lens, len(query) // len(lens)))
        if wrong:
            raise AssertionError(f"{name}: {wrong}")


def main() -> None:
    """Print a table for each number of threads."""
    for count in (1, len(os.sched_getaffinity(0))):
        title = f"{count} threads, medians of {ROUNDS} rounds"
        table = Table(
            "spec", "sequences", "prefix", "own", "without, ms", "shared, ms", "ratio (10 to 90 %)", title=title
        )
        for name, spec in SPECS.items():
            module = pa_compiler.compile(spec, shared_prefix=True)
            module.num_threads = count
            for case in CASES:
                calls = make_calls(module, case)
                check(spec, calls)
                seconds = measure(calls)
                low, ratio, high = np.percentile(seconds[:, 0] / seconds[:, 1], [10, 50, 90])
                own = f"{case.own}" if case.query == 1 else f"{case.own}, {case.query} of them queries"
                times = (f"{each * 1e3:.2f}" for each in np.median(seconds, axis=0))
                row = (
                    name,
                    str(case.sequences),
                    str(case.prefix),
                    own,
                    *times,
                    f"{ratio:.2f} ({low:.2f} to {high:.2f})",
                )
                table.add_row(*row)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
