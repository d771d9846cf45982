"""The pa-compiler command. TVM is imported only by the commands that compile."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console

import pa_compiler
from pa_compiler import compiler, generate
from pa_compiler.backend import checked_limits
from pa_compiler.cli import library as library_cli
from pa_compiler.cli import pages
from pa_compiler.cli import printing as report
from pa_compiler.cli.accuracy import accuracy_command
from pa_compiler.cli.bundles import bundle_command
from pa_compiler.cli.kept import cache_command
from pa_compiler.cli.options import (
    Command,
    call_options,
    check_memory,
    check_takes_numpy,
    compared_numbers,
    extras,
    extras_options,
    replace,
    spec_options,
)
from pa_compiler.cli.progress import step
from pa_compiler.cli.tuning import tune_command
from pa_compiler.cuda import gpus
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.verification import cases

if TYPE_CHECKING:
    from pa_compiler.runtime.module import Module

_STDOUT = Console()
_LEXERS = {"tensorir": "python", "scheduled": "python", "cuda": "cuda", "host": "cpp"}
_LEXERS |= {"llvm": "llvm", "asm": "gas", "ptx": "ptx", "sass": "text"}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True})
@click.version_option(package_name="pa-compiler", prog_name="pa-compiler")
def main() -> None:
    """Compile paged attention from TensorIR to one shared library, run it, and look inside."""


@main.command(cls=Command)
@call_options
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    show_default="as many as fit in a second, 3 to 100",
    help="Timed calls, after one to warm up.",
)
def run(
    case_name: str, target: Any, pipeline: str, threads: int | None, seed: int, repeat: int | None, **_: Any
) -> None:
    """Compile, run on random inputs, time it, and compare with NumPy in float64.

    The exit status is 1 if the result is outside the tolerance.
    """
    case, module = _prepare(case_name, target, pipeline, threads)
    items = module.plan(case.context_lens, case.query_start_loc)
    report.print_header(_STDOUT, case, module, len(items))
    report.print_plan(_STDOUT, items)
    inputs = _make_inputs(case, seed)
    heads = cases.head_arrays(case, seed)
    out, seconds = _measure(module, case, inputs, heads, repeat or _Repeats(3, 100, 1))
    report.print_times(_STDOUT, case, seconds)
    _compare(out, case, inputs, heads)


@main.command(cls=Command)
@call_options
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    show_default="as many as fit in 3 seconds, 10 to 1000",
    help="Timed calls, after one to warm up.",
)
def bench(
    case_name: str, target: Any, pipeline: str, threads: int | None, seed: int, repeat: int | None, **_: Any
) -> None:
    """Time decode, or attend, on a cache of huge pages, each block of which is read once a call.

    The result is compared with NumPy in float64; the exit status is 1 if it is outside the tolerance.
    """
    case, module = _prepare(case_name, target, pipeline, threads)
    items = module.plan(case.context_lens, case.query_start_loc)
    report.print_header(_STDOUT, case, module, len(items))
    inputs = _make_inputs(case, seed, module.empty_cache(case.num_blocks))
    inputs = inputs._replace(block_table=cases.distinct_blocks(case, seed))
    heads = cases.head_arrays(case, seed)
    out, seconds = _measure(module, case, inputs, heads, repeat or _Repeats(10, 1000, 3))
    report.print_distribution(_STDOUT, case, seconds)
    _compare(out, case, inputs, heads)


@main.command(cls=Command)
@spec_options
@extras_options
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The shared library."
)
def build(output: Path, target: Any, pipeline: str, **options: Any) -> None:
    """Compile a spec to one shared library, for pa_compiler.load()."""
    spec = replace(cases.DEFAULT.spec)
    with step("Compiling"):
        module = compiler.compile_to_save(spec, target, pipeline, **extras(options))
    try:
        module.save(output)
    except OSError as error:
        raise click.FileError(click.format_filename(output), error.strerror or str(error)) from error
    if output.is_file():  # and no pipe, which may be what stdout is
        click.echo(f"{click.format_filename(output)}: {output.stat().st_size:,} bytes")


class _OfALibrary(click.Command):
    """A command that has a parser of its own, which sees its words as they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave them alone."""
        ctx.args = list(args)
        return ctx.args

    def invoke(self, ctx: click.Context) -> None:
        """Hand them on."""
        library_cli.main([str(self.name), *ctx.args])


for _name, _run in library_cli.COMMANDS.items():
    main.add_command(_OfALibrary(_name, help=_run.__doc__, add_help_option=False))


main.add_command(bundle_command)
main.add_command(cache_command)
main.add_command(accuracy_command)
main.add_command(pages.report_command)
main.add_command(pages.diff_command)
main.add_command(tune_command)


@main.command(cls=Command)
@spec_options
@extras_options
@click.option("--stage", type=click.Choice(list(_LEXERS)), default="tensorir", help="Stage to print.")
def inspect(stage: str, target: Any, pipeline: str, **options: Any) -> None:
    """Print what one stage of the compiler produced for a spec."""
    spec = replace(cases.DEFAULT.spec)
    with step("Compiling"):
        texts = compiler.emit(spec, target, pipeline, **extras(options))
        if stage not in texts:
            raise ValueError(f"stage: expected one of {', '.join(texts)} for this target, got {stage!r}")
    report.print_code(_STDOUT, texts[stage], _LEXERS[stage])


@main.command("explain", cls=Command)
@spec_options
@click.option("--flops", type=float, help="GFLOP/s of float32 of one core, for the predicted time.")
@click.option("--bandwidth", type=float, help="GB/s that one core reads, for the predicted time.")
@click.option("--gpu", type=click.Choice(list(gpus.GPUS)), help="With --target cuda: the GPU of the predicted time.")
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice(report.SECTIONS),
    show_default="all",
    help="What is printed; it may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def explain_command(
    target: Any,
    pipeline: str,
    flops: float | None,
    bandwidth: float | None,
    gpu: str | None,
    sections: tuple[str, ...],
    as_json: bool,
    **_: Any,
) -> None:
    """Say how a spec is compiled, and why: strategy, tiles, registers, inner loops, and the limit of the machine.

    Nothing is run. The loops are those of the assembly, with the line where each begins in inspect --stage asm; for a
    GPU the instructions of its kernels are counted.
    """
    spec = replace(cases.DEFAULT.spec)
    limits = checked_limits(flops, bandwidth, gpu)
    with step("Compiling"):
        explanation = compiler.explain(spec, target, pipeline, limits)
    if as_json:
        click.echo(report.explanation_json(spec, explanation, sections or report.SECTIONS))
    else:
        report.print_explanation(_STDOUT, spec, explanation, sections or report.SECTIONS)


@main.command("generate", cls=Command)
@click.option("--check", is_flag=True, help="Write nothing: print a diff and exit with 1 if anything differs.")
@click.option(
    "--directory", type=click.Path(file_okay=False, path_type=Path), default="generated", help="Where the files are."
)
def generate_command(check: bool, directory: Path) -> None:
    """Write generated/ again: what the compiler emits for a few named specs."""
    with step("Compiling"):
        diff = generate.check(directory) if check else ""
        changed = [] if check else generate.write(directory)
    report.print_code(_STDOUT, diff, "diff")
    if diff:
        raise click.ClickException(f"{directory}: not what the compiler emits. To write it: pa-compiler generate")
    for path in changed:
        click.echo(directory / path)
    click.echo(f"{directory}: as the compiler emits it")


def _check_memory(case: cases.Case) -> None:
    # The comparison has one sequence in float64 beside the caches.
    check_memory(case.cache_bytes + 8 * case.longest * compared_numbers(case.spec))


def _compile(spec: PagedAttentionSpec, target: Any, pipeline: str, attend: bool) -> Module:
    with step("Compiling"):
        return pa_compiler.compile(spec, target, pipeline, attend=attend)


def _prepare(case_name: str, target: Any, pipeline: str, threads: int | None) -> tuple[cases.Case, Module]:
    """The case that the options give, and its module."""
    check_takes_numpy(target)
    base = cases.CASES.get(case_name, cases.DEFAULT)
    case = replace(base, spec=replace(base.spec))
    _check_memory(case)
    module = _compile(case.spec, target, pipeline, attend=case.query_lens is not None)
    if threads is not None:
        module.num_threads = threads
    return case, module


def _make_inputs(
    case: cases.Case, seed: int, caches: tuple[cases.np.ndarray, cases.np.ndarray | None] | None = None
) -> cases.Inputs:
    elements = int(case.query_counts.sum()) * case.spec.num_heads * case.spec.head_dim
    elements += case.cache_bytes // ITEMSIZES[case.spec.cache_dtype]
    with step("Making the inputs", elements) as advance:
        return cases.make_inputs(case, seed, advance, caches)


class _Repeats(NamedTuple):
    """How often a call is timed: as often as fits in some seconds, within limits."""

    least: int
    most: int
    seconds: float


def _measure(
    module: Module, case: cases.Case, inputs: cases.Inputs, heads: dict[str, Any], repeats: int | _Repeats
) -> tuple[Any, list[float]]:
    """Run once to warm up, then time each of the repeats. No bar: it would take time from what is measured."""

    def timed() -> float:
        start = time.perf_counter()
        cases.call(module, case, inputs, out, **heads)
        return time.perf_counter() - start

    out = cases.call(module, case, inputs, **heads)
    first = timed()
    if isinstance(repeats, _Repeats):
        repeats = min(repeats.most, max(repeats.least, int(repeats.seconds / max(first, 1e-9))))
    return out, [timed() for _ in range(repeats)]


def _compare(out: Any, case: cases.Case, inputs: cases.Inputs, heads: dict[str, Any]) -> None:
    """Compare with the reference, print PASS or FAIL, and exit with 1 after the latter."""
    with step("Comparing with NumPy in float64", case.batch) as advance:
        errors = cases.compare(out, case, inputs, advance, **heads)
    if not report.print_errors(_STDOUT, case, errors):
        sys.exit(1)
