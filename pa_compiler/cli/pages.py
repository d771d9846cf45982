"""The commands that show modules to people: report, a page of one, and diff, what is different in two."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pa_compiler import compiler
from pa_compiler.cli import differences, printing
from pa_compiler.cli.options import Command, SeqLens, extras, extras_options, replace, spec_options
from pa_compiler.cli.progress import step
from pa_compiler.cli.text import flag
from pa_compiler.verification import cases


@click.command("report", cls=Command)
@spec_options
@extras_options
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The page, one HTML file."
)
@click.option("--batch", type=click.IntRange(min=1), show_default="as many as --seq-len names", help="Sequences.")
@click.option(
    "--seq-len",
    "seq_lens",
    type=SeqLens(),
    show_default="4096,33,1024,515",
    help="Tokens of each sequence of the plan.",
)
@click.option(
    "--query-len",
    "query_lens",
    type=SeqLens(),
    show_default="one each, by decode",
    help="Query tokens of each, by attend.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    envvar="PA_NUM_THREADS",
    show_envvar=True,
    show_default="the CPUs of this process",
    help="Threads that share the work of the plan.",
)
@click.option("--flops", type=float, help="GFLOP/s of float32 of one core, for the roofline.")
@click.option("--bandwidth", type=float, help="GB/s that one core reads, for the roofline.")
@click.option("--measure", is_flag=True, help="Predict and time the call of the plan on one thread.")
def report_command(
    output: Path,
    target: Any,
    pipeline: str,
    batch: int | None,
    seq_lens: tuple[int, ...] | None,
    query_lens: tuple[int, ...] | None,
    threads: int | None,
    flops: float | None,
    bandwidth: float | None,
    measure: bool,
    **options: Any,
) -> None:
    """Write a page that shows a compiled spec: stages side by side, inner loops, the plan of a call, and why.

    The page is one HTML file, which needs no network and no server.
    """
    from pa_compiler.report import making
    from pa_compiler.runtime import files

    spec = replace(cases.DEFAULT.spec)
    with step("Compiling"):
        module = compiler.compile_to_save(spec, target, pipeline, **extras(options))
    if threads is not None:
        module.num_threads = threads
    lens = seq_lens or (making.DEFAULT_LENS if batch or query_lens else None)
    count = batch or (len(lens) if lens else 0)
    with contextlib.nullcontext() if measure else step("Making the page"):
        made = making.made(
            module,
            _repeated(lens, count),
            _repeated(query_lens, count),
            flops,
            bandwidth,
            measure,
            again=_again(),
            step=step,
        )
    try:
        files.write(output, made.encode())
    except OSError as error:
        raise click.FileError(click.format_filename(output), error.strerror or str(error)) from error
    if output.is_file():
        click.echo(f"{click.format_filename(output)}: {output.stat().st_size:,} bytes")


def _repeated(lens: tuple[int, ...] | None, count: int) -> list[int] | None:
    """A list as --seq-len takes it: repeated to so many, or cut."""
    return None if lens is None else [lens[at % len(lens)] for at in range(count)]


def _again() -> str:
    """The command line, with the options that were given."""
    ctx = click.get_current_context()
    words = ["pa-compiler", str(ctx.info_name)]
    for param in ctx.command.params:
        value = ctx.params.get(str(param.name))
        if ctx.get_parameter_source(str(param.name)) in (click.core.ParameterSource.DEFAULT, None) or value is None:
            continue
        option = flag(str(param.opts[-1]).lstrip("-"))
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option.lstrip('-')}")
        elif param.name == "inputs":
            for name, (dtype, shape) in value.items():
                words += [option, f"{name}={dtype}:{'x'.join(map(str, shape))}"]
        else:
            words += [option, _word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    """An option's value as it is given."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        words = [str(value[key]) for key in ("mcpu", "arch") if key in value]
        return words[0] if len(words) == 1 and len(value) == 2 else str(value).replace("'", '"')
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)


# A and B may be options in quotes.
@click.command("diff", cls=Command, context_settings={"ignore_unknown_options": True})
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@spec_options
@extras_options
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(["none", *differences.STAGES]),
    show_default="tensorir and scheduled",
    help="Stages whose texts are compared line by line; none for the counts alone.",
)
def diff_command(first: str, second: str, stages: tuple[str, ...], target: Any, pipeline: str, **options: Any) -> None:
    """Say what differs in two modules: counts of each stage first, then text.

    A and B are libraries that were saved, or targets such as x86-64-v3, or options of a spec in quotes, such as
    "--num-heads 32 --dtype float32". The other options are what both have in common.
    """
    common = replace(cases.DEFAULT.spec)
    with step("Compiling"):
        a, b = (
            differences.side(name, words, common, target, pipeline, extras(options))
            for name, words in (("first", first), ("second", second))
        )
    console = Console(width=None)
    printing.print_text(console, differences.counts(a, b, console.width))
    chosen = [stage for stage in stages or ("tensorir", "scheduled") if stage != "none"]
    for stage in chosen:
        printing.print_code(console, differences.text(a, b, stage), "diff")
