"""The benchmark's command: which cases, how many threads, and where the results go."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import machine, report
from benchmarks.cases import ALL_CASES, CASES, sized
from benchmarks.contender import Contender
from benchmarks.measure import CaseResult, measure
from benchmarks.peers import PEERS
from benchmarks.roofline import Probe
from pa_compiler.prediction.rates import last_level_cache
from pa_compiler.runtime import files

_QUICK_CASES = ("16/1-bf16", "16/1-f32", "32/8-bf16", "32/32-f32")
_ROUNDS, _QUICK_ROUNDS = 15, 7
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option(
    "--case", "names", multiple=True, help="A case by its name; may be given again. Default: the common ones."
)
@click.option("--only", help="The cases, of all, that have this in their names, such as mla.")
@click.option(
    "--all", "everything", is_flag=True, help="Other groups and head sizes too, and a small one in the cache."
)
@click.option("--quick", is_flag=True, help="Four cases and fewer rounds.")
@click.option("--threads", "thread_counts", multiple=True, type=click.IntRange(1), default=(1, 2), help="Threads.")
@click.option("--contender", "chosen", multiple=True, type=click.Choice(list(PEERS)), help="Only these.")
@click.option("--peers/--no-peers", default=True, help="Whether to compare with other libraries.")
@click.option("--pages", type=click.Choice(["huge", "4k"]), default="huge", help="What keys and values lie on.")
@click.option("--rounds", type=click.IntRange(1), help=f"Turns for each contender [{_ROUNDS}, quick {_QUICK_ROUNDS}].")
@click.option("--json", "json_path", type=_FILE, help="Write the results there.")
@click.option("--save", is_flag=True, help="Write them to the file in benchmarks/results that is of such cores.")
@click.option("--plot", "plot_path", type=_FILE, help="Draw the roofline there, as SVG; needs matplotlib.")
def main(
    names: tuple[str, ...],
    only: str | None,
    everything: bool,
    quick: bool,
    thread_counts: tuple[int, ...],
    chosen: tuple[str, ...],
    peers: bool,
    pages: str,
    rounds: int | None,
    json_path: Path | None,
    save: bool,
    plot_path: Path | None,
) -> None:
    """Time decode against the machine's limits and against other libraries."""
    for name in names:
        if name not in ALL_CASES:
            raise click.BadParameter(f"expected one of {', '.join(ALL_CASES)}, got {name!r}", param_hint="--case")
    names = names or tuple(ALL_CASES if everything or only else _QUICK_CASES if quick else CASES)
    names = tuple(name for name in names if only is None or only in name)
    if not names:
        raise click.BadParameter(f"expected part of one of {', '.join(ALL_CASES)}, got {only!r}", param_hint="--only")
    rounds = rounds or (_QUICK_ROUNDS if quick else _ROUNDS)
    contenders = chosen or tuple(name for name, peer in PEERS.items() if peers or peer.ours)
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    cache_bytes, cores = last_level_cache(), machine.cores()
    if max(thread_counts) > len(cores):
        console.print(f"{max(thread_counts)} threads: left out, this process may use {len(cores)} core(s)")
    about = f"last-level cache {cache_bytes / 2**20:.0f} MB, KV beyond it"
    console.print(f"{machine.cpu_name()}, {about}, {pages} pages, {rounds} rounds")
    probe = Probe(cache_bytes)
    cases = {name: sized(name, cache_bytes) for name in names}
    results: list[CaseResult] = []
    for num_threads in (count for count in thread_counts if count <= len(cores)):
        cpus = cores[:num_threads]
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers = [stack.enter_context(Contender(name, cpus, pages == "huge", logs / name)) for name in contenders]
            status = stack.enter_context(console.status(""))
            for name, case in cases.items():
                results += measure({name: case}, workers, probe, cpus, rounds=rounds, tell=status.update)
                report.print_case(console, results[-1])
        report.print_roofline(console, results[-1].roofline, num_threads)
    path = machine.results("decode") if save else json_path
    _write(report.as_json(results, pages == "huge", rounds), path, plot_path)
    wrong = [f"{result.name}: {row.reason}" for result in results for row in result.results if is_wrong(row)]
    if wrong:
        raise click.ClickException("; ".join(wrong))


def _write(measured: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> None:
    if json_path is not None:
        json_path.parent.mkdir(exist_ok=True)
        files.write(json_path, f"{json.dumps(measured)}\n".encode())
    if plot_path is not None:
        from benchmarks.plot import plot  # matplotlib is not needed otherwise

        plot(measured, plot_path)


def is_wrong(row: report.Result) -> bool:
    """Whether our own result is outside its bound: that fails the run, a peer's is only reported."""
    return PEERS[row.contender].ours and row.error is not None and not row.error <= 1
