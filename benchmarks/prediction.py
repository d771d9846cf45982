"""Predict how long calls of decode take on one thread, and measure it: python -m benchmarks.prediction.

What pa_compiler.prediction does for a page, for the cases of the benchmark: the order in which each reads memory is
written down first, and then each is timed, with the probes between its calls.
"""

from __future__ import annotations

import dataclasses
import os

import click
from rich.console import Console

import pa_compiler
from benchmarks import machine
from benchmarks.cases import ALL_CASES, CASES, sized
from pa_compiler.prediction import calls
from pa_compiler.prediction.rates import Rates, last_level_cache


@click.command(context_settings={"show_default": True})
@click.option("--case", "names", multiple=True, type=click.Choice(list(ALL_CASES)), help="Default: the common ones.")
def main(names: tuple[str, ...]) -> None:
    """Predict calls of decode on one thread, and measure them."""
    os.sched_setaffinity(0, {machine.cores()[0]})
    console = Console(highlight=False)
    console.print(f"{machine.cpu_name()}; one thread, times in ms")
    console.print(f"{'':28}  in cache  memory  predicted  measured  ratio")
    rows = []
    for name in names or CASES:
        for layout in ("NHD", "packed"):
            case = sized(name, last_level_cache())
            case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, kv_layout=layout))
            with console.status(f"{name} {layout}: its order"):
                module = pa_compiler.compile(case.spec, attend=False)
                if reason := calls.unknown(module, case):
                    raise click.ClickException(reason)
                call = calls.prepared(module, case)
                rows.append((f"{name} {layout}", call, calls.ordered(call)))
    rates = Rates()
    for name, call, lines in rows:
        found = calls.measured(call, rates, lines)
        if found.predicted is not None:
            near, memory, whole = (1e3 * seconds for seconds in found.predicted)
            took = 1e3 * found.seconds
            console.print(f"{name:28}  {near:8.2f}  {memory:6.2f}  {whole:9.2f}  {took:8.2f}  {whole / took:5.2f}")


if __name__ == "__main__":
    main()
