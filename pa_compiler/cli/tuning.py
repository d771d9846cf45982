"""The command tune: which tiles are fastest for a spec on this CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from pa_compiler import backends, records
from pa_compiler.cli.options import Command, replace, spec_options
from pa_compiler.verification import cases

if TYPE_CHECKING:
    from pa_compiler.tuning import Tuned

_STDOUT, _STDERR = Console(), Console(stderr=True)


@click.command("tune", cls=Command)
@spec_options
@click.option("--seconds", type=click.FloatRange(min=1), default=110.0, help="No library is built after so many.")
@click.option(
    "--threads", type=click.IntRange(min=1), show_default="the CPUs of this process", help="Threads of the calls."
)
@click.option("--forget", is_flag=True, help="Remove the record of the spec, and measure nothing.")
def tune_command(target: Any, pipeline: str, seconds: float, threads: int | None, forget: bool, **_: Any) -> None:
    """Time what this CPU does best for a spec, and keep it: compile takes it up from now on.

    Libraries with other tiles are built one after the other, compared with float64, and timed in turns with the best so
    far, on contexts that no cache holds. The record is of this CPU and of the spec; PA_TUNE=0 ignores it, and explain
    says where one was used. Use an idle machine.
    """
    spec = replace(cases.DEFAULT.spec)
    config = backends.normalize(target)
    if not backends.of(config).names_no_cpu(config):
        raise ValueError(f"target: expected llvm, the CPU of this machine, for tune, got {target!r}")
    if pipeline != "fused":
        raise ValueError(f"pipeline: expected fused for tune, got {pipeline!r}")
    if forget:
        path = records.path_of(spec)
        click.echo(f"{path}: {'removed' if records.forget(spec) else 'there is none'}")
        return
    from pa_compiler import tuning

    with _STDERR.status("tuning") as status:
        say = status.update if _STDERR.is_terminal else _STDERR.print
        found = tuning.tune(spec, seconds=seconds, threads=threads, progress=say)
    _print(found)


def _print(found: Tuned) -> None:
    """The trials as a table, and what became of them."""
    table = Table("kernel", "varied", "to", "times as fast", "quartiles", "", box=box.SIMPLE_HEAD)
    for trial in found.trials:
        ratio, spread = f"{trial.ratio:.2f}", f"{trial.spread[0]:.2f} - {trial.spread[1]:.2f}"
        table.add_row(trial.kernel, trial.choice, _words(trial.fields), ratio, spread, "taken" if trial.taken else "")
    _STDOUT.print(table)
    if not found.finished:
        click.echo("The time was over before all choices were tried: --seconds gives more.")
    for kernel, fields in found.tuned.items():
        click.echo(f"{kernel}: {_words(fields)}")
    if not found.tuned:
        click.echo("The tiles of the table are the best that was tried.")
    click.echo(f"{click.format_filename(found.path)}: compile takes it up; PA_TUNE=0 ignores it")


def _words(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
