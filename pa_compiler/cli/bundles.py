"""The command bundle: a library with a C interface, for several specs and CPUs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

import pa_compiler
from pa_compiler import backends, naming
from pa_compiler.cli.options import Command, Target, replace, spec_fields
from pa_compiler.cli.progress import step
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import cases


@click.command("spec", cls=Command, add_help_option=False)
@spec_fields
def _spec(**_: Any) -> PagedAttentionSpec:
    """The options of one spec."""
    return replace(cases.DEFAULT.spec)


class SpecOptions(click.ParamType):
    """A spec as the options that build would take for it."""

    name = "OPTIONS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PagedAttentionSpec:
        """Parse an option's value."""
        try:
            words = shlex.split(value)
            with _spec.make_context("spec", words, parent=ctx) as own:
                return _spec.invoke(own)
        except (click.UsageError, ValueError) as error:
            message = error.format_message() if isinstance(error, click.UsageError) else str(error)
            self.fail(
                f"expected options of a spec, such as '--num-heads 32 --num-kv-heads 8', got {value!r}: {message}"
            )


class Targets(click.ParamType):
    """Names of CPUs with commas between them, or one TVM target as JSON."""

    name = "TARGETS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[backends.TargetLike]:
        """Parse an option's value."""
        words = [value] if value.startswith("{") else value.split(",")
        return [Target().convert(word.strip(), param, ctx) for word in words]


@click.command("bundle", cls=Command)
@click.option(
    "--spec",
    "specs",
    type=SpecOptions(),
    multiple=True,
    required=True,
    help="The options of a spec, as build takes them, in quotes; once for each.",
)
@click.option(
    "--targets",
    type=Targets(),
    multiple=True,
    required=True,
    help="Names of CPUs with commas between them, such as x86-64-v3,x86-64-v4; or a TVM target as JSON, once for each.",
)
@click.option(
    "--processes", type=click.IntRange(min=1), show_default="the CPUs, up to 8", help="That compile at a time."
)
@click.option(
    "-o", "--output", "directory", type=click.Path(path_type=Path), required=True, help="The directory, which is made."
)
def bundle_command(
    specs: tuple[PagedAttentionSpec, ...],
    targets: tuple[list[backends.TargetLike], ...],
    processes: int | None,
    directory: Path,
) -> None:
    """Compile specs for several CPUs into one library for C and C++, which chooses when it is loaded.

    It needs libc, libm and pthread to run. The directory gets lib/libpa.so and libpa.a, include/pa.h, files for CMake
    and pkg-config, manifest.json, and the text of every stage.
    """
    with step("Compiling"):
        pa_compiler.bundle(specs, [each for some in targets for each in some], directory, processes=processes)
    library = directory / "lib" / "libpa.so"
    click.echo(f"{click.format_filename(library)}: {library.stat().st_size:,} bytes")
    for spec in specs:
        click.echo(naming.spec_name(spec))
