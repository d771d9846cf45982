"""How fast attend is on prompts, chunks, guesses and mixed batches, beside other libraries.

    python -m benchmarks.attend --cases '32/8-bf16-*' --threads 1

Contenders take turns as for decode (benchmarks/run.py), on the same arrays. Of each result the first and the last query
token of every sequence, and others at random up to 64, are compared with float64. FLOPs are those of the keys that are
seen, and shares are of the peak of the instruction that multiplies the elements. Peers that take one query token of a
sequence alone are left out.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine, report
from benchmarks.attend_cases import COMMON, GROUPS
from benchmarks.contender import Contender
from benchmarks.measure import CaseResult, measure
from benchmarks.peers import PEERS
from benchmarks.roofline import Probe
from benchmarks.run import is_wrong
from pa_compiler.prediction.rates import last_level_cache
from pa_compiler.runtime import files

_RAGGED = [name for name, peer in PEERS.items() if peer.ragged]
_ROUNDS = 15
_SECONDS = {False: 40.0, True: 8.0}  # of the rounds of cases that are measured together, by --quick


@click.command(context_settings={"show_default": True})
@click.option("--cases", "patterns", multiple=True, default=COMMON, help="Cases by name, with *; see --list.")
@click.option("--list", "lists", is_flag=True, help="Print the names of all cases and stop.")
@click.option("--quick", is_flag=True, help="Fewer rounds, three at least.")
@click.option("--threads", "thread_counts", multiple=True, type=click.IntRange(1), default=(1, 2), help="Threads.")
@click.option("--contender", "chosen", multiple=True, type=click.Choice(_RAGGED), help="Only these.")
@click.option("--rounds", type=click.IntRange(1), default=_ROUNDS, help="Turns for each contender, at most.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Add the results to that file.")
@click.option("--save", is_flag=True, help="Add them to the file in benchmarks/results that is of such cores.")
@click.option("--table", "tabulates", is_flag=True, help="Print the table of that file, and measure nothing.")
def main(
    patterns: tuple[str, ...],
    lists: bool,
    quick: bool,
    thread_counts: tuple[int, ...],
    chosen: tuple[str, ...],
    rounds: int,
    path: Path | None,
    save: bool,
    tabulates: bool,
) -> None:
    """Time attend beside other libraries, and print a table in Markdown."""
    path = machine.results("attend") if save else path
    console = Console(highlight=False)
    console.width = max(console.width, 180)  # of the table in Markdown
    names = [name for name in GROUPS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if lists:
        console.print(*GROUPS, sep="\n", markup=False)
        return
    if tabulates:
        if path is None or not path.exists():
            raise click.BadParameter(f"expected a file that exists, got {path}", param_hint="--json")
        _print_table(console, json.loads(path.read_text())["cases"])
        return
    if not names:
        raise click.BadParameter(f"expected a pattern of the names of --list, got {patterns}", param_hint="--cases")
    results: list[CaseResult] = []
    for found in _measured(console, names, thread_counts, chosen or _RAGGED, rounds, _SECONDS[quick]):
        results += found
        if path is not None:  # after each: a run of hours may be interrupted
            path.parent.mkdir(exist_ok=True)
            files.write(path, f"{json.dumps(_added(path, report.as_json(found, True, rounds)))}\n".encode())
    _print_table(console, report.as_json(results, True, rounds)["cases"])
    wrong = [f"{result.name}: {row.reason}" for result in results for row in result.results if is_wrong(row)]
    if wrong:
        raise click.ClickException("; ".join(wrong))


def _measured(
    console: Console,
    names: Sequence[str],
    thread_counts: Sequence[int],
    contenders: Sequence[str],
    rounds: int,
    seconds: float,
) -> Iterator[list[CaseResult]]:
    """Measure groups of cases, by their names, and print each."""
    cache_bytes, cores = last_level_cache(), machine.cores()
    left_out = ", ".join(peer.title for peer in PEERS.values() if not peer.ragged)
    console.print(f"{machine.cpu_name()}, last-level cache {cache_bytes / 2**20:.0f} MB; without {left_out}")
    probe = Probe(cache_bytes)
    for cpus in (cores[:count] for count in thread_counts if count <= len(cores)):
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers = [stack.enter_context(Contender(name, cpus, True, logs / name)) for name in contenders]
            status = stack.enter_context(console.status(""))
            for group in (GROUPS[name] for name in names):
                limits: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "parts": group.parts}
                found = measure(group.sized(cache_bytes), workers, probe, cpus, tell=status.update, **limits)
                for result in found:
                    report.print_case(console, result)
                yield found
        report.print_roofline(console, found[-1].roofline, len(cpus))


def _added(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured, with the other cases that a file has from a CPU of the same name."""
    before = json.loads(path.read_text()) if path.exists() else measured
    if before["cpu"] != measured["cpu"]:
        return measured
    again = {(case["name"], case["num_threads"]) for case in measured["cases"]}
    kept = [case for case in before["cases"] if (case["name"], case["num_threads"]) not in again]
    order = [name for group in GROUPS.values() for name in group.cases]
    cases = sorted(kept + measured["cases"], key=lambda case: (case["num_threads"], order.index(case["name"])))
    return measured | {"cases": cases}


def _print_table(console: Console, cases: Sequence[dict[str, Any]]) -> None:
    """A row for each case, as documents have it: our GFLOP/s and shares, the best peer's, and the ratios."""
    for count in sorted({case["num_threads"] for case in cases}):
        table = Table(box=box.MARKDOWN)
        for column in ("case", "NHD", "packed", "best peer"):
            table.add_column(column, no_wrap=True)
        for which in ("peer", "parts"):
            table.add_column(f"NHD / {which}", no_wrap=True)
            table.add_column(f"packed / {which}", no_wrap=True)
        for case in cases:
            if case["num_threads"] == count:
                table.add_row(case["name"], *_row(case))
        console.print(f"\n{count} thread{'s'[: count > 1]}", table, sep="\n")


def _row(case: dict[str, Any]) -> list[str]:
    rows = {row["contender"]: row for row in case["results"] if row["seconds"]}
    peak = case["roofline"]["bf16_arithmetic" if case["dtype"] == "bfloat16" else "arithmetic"]

    def rate(name: str | None) -> str:
        if name not in rows:
            return ""
        of = case["flops"] / rows[name]["seconds"][0]
        return f"{of / 1e9:.0f}, {100 * of / peak:.0f} %"

    def ratio(name: str, which: str) -> str:
        spread = rows[name][which] if name in rows else None
        return "" if spread is None else "{:.2f} ({:.2f}-{:.2f})".format(*spread)

    best = case["best_peer"]
    ours = ["ours", "ours-packed"]
    return [
        *map(rate, ours),
        f"{best} {rate(best)}" if best else "",
        *(ratio(name, which) for which in ("to_best_peer", "to_parts") for name in ours),
    ]


if __name__ == "__main__":
    main()
