"""What is shown on stderr while something is going on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_STDERR = Console(stderr=True)


@contextlib.contextmanager
def step(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show on stderr that something is going on: a bar on a terminal, a line elsewhere."""
    if not _STDERR.is_terminal:
        _STDERR.print(f"{label} ...")
        yield lambda count: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_STDERR, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
