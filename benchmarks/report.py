"""The table that a run prints, and its results as JSON."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.measure import CaseResult, Result, Spread
from benchmarks.peers import PEERS
from benchmarks.roofline import Roofline
from pa_compiler.prediction.rates import last_level_cache

_OWN = 0.95  # of a CPU's time: below it the machine is not idle


def print_roofline(console: Console, roofline: Roofline, num_threads: int) -> None:
    """Print the machine's limits."""
    bf16 = f"{roofline.bf16_arithmetic / 1e9:.1f}"
    if roofline.bf16_arithmetic == roofline.arithmetic:
        bf16 = "the same: this CPU has no instruction for it"
    console.print(f"\n[bold]Limits of {_threads(num_threads)}[/bold], medians of the probes between the rounds")
    console.print(f"  float32 FMA     {roofline.arithmetic / 1e9:.1f} GFLOP/s")
    console.print(f"  bfloat16 dot    {bf16}")
    console.print(f"  memory          {roofline.bandwidth / 1e9:.1f} GB/s ({roofline.reading})")
    if roofline.share < _OWN:
        had = f"{100 * roofline.share:.0f} %"
        console.print(f"[yellow]The probes had {had} of their CPUs: other processes ran. Measure on an idle machine.")


def print_case(console: Console, result: CaseResult) -> None:
    """Print one case: a row for each contender that ran, a line for each that did not.

    GB/s are of the case's keys and values, whatever type a contender keeps them in; error is a fraction of its bound.
    """
    case = result.case
    size = f"{case.num_tokens:,} tokens of {case.batch} sequences, {case.kv_bytes / 1e6:.0f} MB of KV"
    if case.query_lens is not None:
        size = f"{int(case.query_counts.sum()):,} query tokens, {size}"
    limit = peak(result) if case.query_lens is not None else result.roofline.limit(case)
    console.print(
        f"\n[bold]{result.name}, {_threads(result.num_threads)}[/bold]: {size}, at most {limit / 1e9:.1f} GFLOP/s"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True, min_width=max(len(_title(row, result)) for row in result.results))
    shown = [row for row in result.results if row.seconds is not None]
    for column in _cells(shown[0], result) if shown else ():
        table.add_column(column, justify="right", no_wrap=True)
    for row in shown:
        table.add_row(_title(row, result), *_cells(row, result).values())
    console.print(table)
    for row in result.results:
        if row.reason:
            console.print(f"{_title(row, result)}: {row.reason}", style="dim", markup=False)


def peak(result: CaseResult) -> float:
    """Operations per second of the instruction that multiplies a case's elements."""
    return result.roofline.peak(result.case.spec.dtype)


def as_json(results: list[CaseResult], huge_pages: bool, rounds: int) -> dict[str, Any]:
    """Everything that was measured; rates in 1/s, times in seconds, spreads as [median, 10th, 90th percentile]."""
    return {
        "cpu": machine.cpu_name(),
        "last_level_cache": last_level_cache(),
        "huge_pages": huge_pages,
        "rounds": rounds,
        "contenders": {name: peer.title for name, peer in PEERS.items()},
        "cases": [_case_json(result) for result in results],
    }


def _case_json(result: CaseResult) -> dict[str, Any]:
    case, spec = result.case, result.case.spec
    return {
        "name": result.name,
        "num_threads": result.num_threads,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "value_dim": spec.result_dim,
        "shared_kv": spec.shared_kv,
        "block_size": spec.block_size,
        "dtype": spec.dtype,
        "context_lens": case.context_lens.tolist(),
        "query_lens": case.query_counts.tolist(),
        "flops": case.flops,
        "kv_bytes": case.kv_bytes,
        "roofline": vars(result.roofline) | {"limit": result.roofline.limit(case)},
        "best_peer": result.best_peer,
        "results": [vars(row) for row in result.results],
    }


def _title(row: Result, result: CaseResult) -> str:
    mark = " *" if row.contender == result.best_peer else ""
    return PEERS[row.contender].title + mark


def _cells(row: Result, result: CaseResult) -> dict[str, str]:
    """A row's cells by their columns. Several query tokens are judged by arithmetic alone, one by the roofline."""
    assert row.seconds is not None
    assert row.of_limit is not None
    case, seconds = result.case, row.seconds.median
    cells = {"ms": f"{1e3 * seconds:.2f}", "GFLOP/s": f"{case.flops / seconds / 1e9:.1f}"}
    if case.query_lens is None:
        cells |= {"GB/s": f"{case.kv_bytes / seconds / 1e9:.2f}", "of roofline": f"{100 * row.of_limit.median:.0f} %"}
    else:
        cells["of peak"] = f"{100 * case.flops / seconds / peak(result):.0f} %"
    cells["to best peer (*)"] = _ratio(row.to_best_peer)
    if any(other.to_parts for other in result.results):
        cells["to its parts"] = _ratio(row.to_parts)
    return cells | {"error": f"{row.error:.2f}"}


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
