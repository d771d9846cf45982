"""The rows that benchmarks.engines has measured: a file of them, and the tables that are made of it."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks import machine


class Case(NamedTuple):
    """What is measured together, in turns. Its text names it on the command line and in the file.

    Attributes:
        what: "prefill", "decode" or "continuous".
        model, dtype: Names.
        threads, context, batch: Numbers. Prefill has a batch of 1.
    """

    what: str
    model: str
    dtype: str
    threads: int
    context: int
    batch: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def parsed(text: str) -> Case:
    """The case that a text names."""
    what, model, dtype, *numbers = text.split("/")
    return Case(what, model, dtype, *map(int, numbers))


def save(path: Path, case: Case, rates: dict[str, dict[str, list[float]]]) -> None:
    """Put the tokens/s of a case, by contender and by "wall" or "cpu", into the file, beside what is there."""
    kept = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    kept["machine"] = machine.cpu_name()
    kept["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pa_compiler": importlib.metadata.version("pa-compiler"),
    }
    kept["rows"][str(case)] = rates
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def print_tables(path: Path) -> None:
    """Print a table for each kind of case: medians of wall time, and how many times the best stock rate ours is.

    The ratio is the median of those within a turn, as machines drift from turn to turn, and the least of any stock's.
    """
    kept = json.loads(path.read_text())
    print(kept["machine"], ", ".join(" ".join(each) for each in kept["versions"].items()), sep="; ")
    rows = {parsed(name): found for name, found in kept["rows"].items()}
    for what in ("prefill", "decode", "continuous"):
        chosen = {case: found for case, found in sorted(rows.items()) if case.what == what}
        if chosen:
            print(f"\n{what}, tokens/s: median (quartiles) of wall time")
            print("\n".join(_table(chosen)))


def _table(rows: dict[Case, dict[str, Any]]) -> Iterable[str]:
    stock, ours = [each for each in next(iter(rows.values())) if each != "pa_compiler"], "pa_compiler"
    columns = ["model", "type", "threads", "context", "batch", *stock, ours, "of the best", "in CPU time"]
    yield "| " + " | ".join(columns) + " |"
    yield "| --- " * len(columns) + "|"
    for case, found in rows.items():
        ratios = [min(_ratio(found[ours][kind], found[each][kind]) for each in stock) for kind in ("wall", "cpu")]
        cells = [*map(str, case[1:]), *(_cell(found[each]["wall"]) for each in (*stock, ours))]
        yield "| " + " | ".join([*cells, *(f"{ratio:.2f}" for ratio in ratios)]) + " |"


def _ratio(ours: list[float], others: list[float]) -> float:
    """The median of the ratios of turns."""
    return statistics.median(mine / other for mine, other in zip(ours, others, strict=True))


def _cell(rates: list[float]) -> str:
    if len(rates) == 1:
        return _number(rates[0])
    lower, median, upper = map(_number, statistics.quantiles(rates, n=4, method="inclusive"))
    return f"{median} ({lower}-{upper})"


def _number(rate: float) -> str:
    """Of three digits, and no fewer than are before the point."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
