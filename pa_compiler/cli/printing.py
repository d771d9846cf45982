"""What the pa-compiler command prints."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pa_compiler.cli import text
from pa_compiler.interface import AttendItem, WorkItem
from pa_compiler.verification.cases import Case
from pa_compiler.verification.comparison import Errors
from pa_compiler.verification.tolerances import tolerance
from pa_compiler.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pa_compiler.backend import Explanation
    from pa_compiler.runtime.module import Module
    from pa_compiler.spec import PagedAttentionSpec

_LONG_PLAN = 12
_SHOWN_OF_LONG_PLAN = 6


def print_header(console: Console, case: Case, module: Module, num_items: int) -> None:
    """Print the spec, what it is compiled for, and the size of the call."""
    spec, target = case.spec, module.target
    lens = case.context_lens
    lengths = f" of {_between(lens)} tokens" if case.batch else ""
    queries = "" if case.query_lens is None else f", {counted(int(case.query_counts.sum()), 'query token')}"
    print_facts(
        console,
        [
            *text.spec_rows(spec),
            ("target", text.target_text(target)),
            ("pipeline", f"{module.pipeline}, {counted(module.num_threads, 'thread')}"),
            (
                "call",
                f"{counted(case.batch, 'sequence')}{lengths}, {counted(case.num_tokens, 'token')} in all{queries}",
            ),
            ("plan", counted(num_items, "work item")),
        ],
    )


def print_plan(console: Console, items: Sequence[WorkItem | AttendItem]) -> None:
    """Print the work items: all of a short plan, the first few and a summary of a long one."""
    shown = items if len(items) <= _LONG_PLAN else items[:_SHOWN_OF_LONG_PLAN]
    ragged = any(isinstance(item, AttendItem) for item in items)
    heads = ("query tokens", "kv heads") if ragged else ("tokens",)
    rows = [(str(index), *_item(item, ragged)) for index, item in enumerate(shown)]
    lines = ["", *text.table(("item", "sequences", "blocks", *heads), rows, gap=2).splitlines()]
    if len(items) > len(shown):
        tokens = (
            ""
            if ragged
            else f"; {_between([item.num_tokens for item in items if isinstance(item, WorkItem)])} tokens an item"
        )
        lines.append(f"... and {len(items) - len(shown):,} more{tokens}")
    print_text(console, "\n  ".join(lines) + "\n")


def _item(item: WorkItem | AttendItem, ragged: bool) -> tuple[str, ...]:
    """What the table says of an item, beside items with several query tokens or without."""
    blocks = _range(item.block_begin, item.block_end)
    if isinstance(item, AttendItem):
        heads = _range(item.kv_head_begin, item.kv_head_begin + item.num_kv_heads)
        return _range(item.seq, item.seq + 1), blocks, f"{item.num_query:,}", heads
    of = (f"{item.num_seqs:,}", "all") if ragged else (f"{item.num_tokens:,}",)
    return _range(item.batch_start, item.batch_start + item.num_seqs), blocks, *of


def print_times(console: Console, case: Case, seconds: Sequence[float]) -> None:
    """Print the median time of a call and the rates that it means."""
    median = statistics.median(seconds)
    print_facts(
        console,
        [
            ("time", f"{_time(median)}, median of {len(seconds)} ({_time(min(seconds))} to {_time(max(seconds))})"),
            ("rate", f"{case.flops / median / 1e9:.1f} GFLOP/s, {case.kv_bytes / median / 1e9:.2f} GB/s of KV read"),
        ],
    )


def print_distribution(console: Console, case: Case, seconds: Sequence[float]) -> None:
    """Print the median and the 10th and 90th percentiles of the time of a call, and of the rates that they mean."""
    low, median, high = np.percentile(seconds, [10, 50, 90])

    def rates(amount: int, digits: int) -> str:
        return (
            f"{amount / median / 1e9:.{digits}f} ({amount / high / 1e9:.{digits}f} to {amount / low / 1e9:.{digits}f})"
        )

    print_facts(
        console,
        [
            ("time", f"{_time(median)}, median of {len(seconds)}; 10 % to 90 %: {_time(low)} to {_time(high)}"),
            ("GFLOP/s", rates(case.flops, 1)),
            ("GB/s", f"{rates(case.kv_bytes, 2)}, of {case.kv_bytes / 1e6:,.3f} MB of KV a call"),
        ],
    )


def print_errors(console: Console, case: Case, errors: Errors) -> bool:
    """Print the error against the reference, and PASS or FAIL; return whether it passed."""
    passed = errors.of_tolerance <= 1
    of_out, of_magnitude = tolerance(case.spec, case.longest)
    bound = f"{of_out:g} |out| + {of_magnitude:g} sum(p |v|)" if of_out else f"{of_magnitude:g} sum(p |v|)"
    if case.spec.softcap is not None or case.spec.alibi or case.spec.sinks or case.spec.score_mod:
        bound += " + the rounding of scores"
    print_facts(
        console,
        [
            ("error", f"{errors.absolute:.2e} at most, against NumPy in float64"),
            ("bound", f"{bound}, of which {errors.of_tolerance:.2g} is used"),
            ("result", "PASS" if passed else "FAIL: the error is over the bound"),
        ],
    )
    return passed


SECTIONS = ("spec", "decisions", "loops", "legend")
"""The parts of an explanation: what is compiled, what is decided for it, its machine code, and what the heads mean."""


def print_explanation(
    console: Console, spec: PagedAttentionSpec, explanation: Explanation, sections: Sequence[str] = SECTIONS
) -> None:
    """Print how a spec is compiled: decisions, then a table of its machine code with what the heads mean."""
    target = ("target", text.target_text(explanation.target))
    facts = [*text.spec_rows(spec), target] if "spec" in sections else []
    facts += explanation.facts if "decisions" in sections else []
    parts = [text.facts(facts, console.width)] if facts else []
    if "loops" in sections:
        remark = text.wrapped(explanation.remark, console.width, 0)
        parts.append("\n".join([text.table(explanation.heads, explanation.code), *([remark] if remark else [])]))
    if "legend" in sections:
        parts.append(text.facts(explanation.legend, console.width))
    print_text(console, "\n\n".join(parts))


def explanation_json(spec: PagedAttentionSpec, explanation: Explanation, sections: Sequence[str] = SECTIONS) -> str:
    """The same as JSON: a member for each section. Numbers of loops are numbers, by their heads."""
    loops, heading = [], ""
    for row in explanation.code:
        if isinstance(row, str):
            heading = row
        else:
            loops.append({"of": heading} | dict(zip(explanation.heads, map(int, row), strict=True)))
    parts = {
        "spec": {"fields": spec.stated(), "target": dict(explanation.target)},
        "decisions": dict(explanation.facts),
        "loops": loops,
        "legend": dict(explanation.legend),
    }
    return json.dumps({name: part for name, part in parts.items() if name in sections}, indent=1)


def print_code(console: Console, code: str, lexer: str) -> None:
    """Print text with colours on a terminal, and byte for byte elsewhere. Lines are never cut."""
    if console.is_terminal:
        from rich.syntax import Syntax

        console.print(Syntax(code, lexer, background_color="default").highlight(code), soft_wrap=True, end="")
    else:
        console.file.write(code)


def print_facts(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print labels, and beside each its text, as wide as the terminal is."""
    print_text(console, text.facts(rows, console.width))


def print_text(console: Console, lines: str) -> None:
    """Print lines as they are, longer ones too; on a terminal with labels in bold, and verdicts in colours."""
    styled = console.render_str(lines, markup=False, emoji=False, highlight=True)
    styled.highlight_regex(r"(?m)^\w.{,7}(?=  )", "bold")
    styled.highlight_words(["PASS"], "bold green")
    styled.highlight_words(["FAIL"], "bold red")
    console.print(styled, soft_wrap=True)


def _between(numbers: Sequence[int] | np.ndarray) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _range(begin: int, end: int) -> str:
    if end <= begin:
        return "none"
    return str(begin) if end - begin == 1 else f"{begin}-{end - 1}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms" if seconds < 0.1 else f"{seconds:,.3f} s"
