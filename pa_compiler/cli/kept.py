"""The commands cache dir and cache clear: where compiled modules are kept, and deleting them."""

from __future__ import annotations

import click

from pa_compiler.cli.options import Command


@click.group("cache")
def cache_command() -> None:
    """Look after the compiled modules that are kept on disk."""


@cache_command.command("dir", cls=Command)
def cache_dir() -> None:
    """Print where compiled modules are kept: PA_CACHE_DIR, else the user's cache directory."""
    from pa_compiler import store as cache

    click.echo(click.format_filename(cache.directory()))


@cache_command.command("clear", cls=Command)
def cache_clear() -> None:
    """Delete all compiled modules."""
    from pa_compiler import store as cache

    cache.clear()
