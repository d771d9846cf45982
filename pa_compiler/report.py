"""What the pa-compiler command prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from pa_compiler.cases import Case, Errors
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tolerances import tolerance

if TYPE_CHECKING:
    from pa_compiler.manifest import Manifest
    from pa_compiler.module import Module, WorkItem
    from pa_compiler.verify import Verification

_VECTOR_EXTENSIONS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4.2": "SSE4.2"}
_LONG_PLAN = 12
_SHOWN_OF_LONG_PLAN = 6
_SHOWN_FAILURES = 5


def print_header(console: Console, case: Case, module: Module, num_items: int) -> None:
    """Print the spec, what it is compiled for, and the size of the call."""
    spec, target = case.spec, module.target
    lens = case.context_lens
    table = facts()
    for label, text in spec_rows(spec):
        table.add_row(label, text)
    table.add_row("target", target_text(target))
    table.add_row("pipeline", f"{module.pipeline}, {counted(module.num_threads, 'thread')}")
    lengths = f" of {_between(lens)} tokens" if case.batch else ""
    table.add_row("call", f"{counted(case.batch, 'sequence')}{lengths}, {counted(case.num_tokens, 'token')} in all")
    table.add_row("plan", counted(num_items, "work item"))
    console.print(table)


def print_plan(console: Console, items: Sequence[WorkItem]) -> None:
    """Print the work items: all of a short plan, the first few and a summary of a long one."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("item", "sequences", "blocks", "tokens"):
        table.add_column(name, justify="right", overflow="fold")
    shown = items if len(items) <= _LONG_PLAN else items[:_SHOWN_OF_LONG_PLAN]
    for index, item in enumerate(shown):
        table.add_row(
            str(index),
            _range(item.batch_start, item.batch_start + item.num_seqs),
            _range(item.block_begin, item.block_end),
            f"{item.num_tokens:,}",
        )
    console.print()
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if len(items) > len(shown):
        tokens = _between([item.num_tokens for item in items])
        console.print(f"  ... and {len(items) - len(shown):,} more; {tokens} tokens an item")
    console.print()


def print_times(console: Console, case: Case, seconds: Sequence[float]) -> None:
    """Print the median time of a call and the rates that it means."""
    median = statistics.median(seconds)
    table = facts()
    table.add_row("time", f"{_time(median)}, median of {len(seconds)} ({_time(min(seconds))} to {_time(max(seconds))})")
    table.add_row(
        "rate", f"{case.flops / median / 1e9:.1f} GFLOP/s, {case.kv_bytes / median / 1e9:.2f} GB/s of KV read"
    )
    console.print(table)


def print_distribution(console: Console, case: Case, seconds: Sequence[float]) -> None:
    """Print the median and the 10th and 90th percentiles of the time of a call, and of the rates that they mean."""
    low, median, high = np.percentile(seconds, [10, 50, 90])

    def rates(amount: int, digits: int) -> str:
        return (
            f"{amount / median / 1e9:.{digits}f} ({amount / high / 1e9:.{digits}f} to {amount / low / 1e9:.{digits}f})"
        )

    table = facts()
    table.add_row("time", f"{_time(median)}, median of {len(seconds)}; 10 % to 90 %: {_time(low)} to {_time(high)}")
    table.add_row("GFLOP/s", rates(case.flops, 1))
    table.add_row("GB/s", f"{rates(case.kv_bytes, 2)}, of {case.kv_bytes / 1e6:,.3f} MB of KV a call")
    console.print(table)


def print_errors(console: Console, case: Case, errors: Errors) -> bool:
    """Print the error against the reference, and PASS or FAIL; return whether it passed."""
    passed = errors.of_tolerance <= 1
    of_out, of_magnitude = tolerance(case.spec, case.longest)
    bound = f"{of_out:g} |out| + {of_magnitude:g} sum(p |v|)" if of_out else f"{of_magnitude:g} sum(p |v|)"
    table = facts()
    table.add_row("error", f"{errors.largest:.2e} at most, against NumPy in float64")
    table.add_row("bound", f"{bound}, of which {errors.of_tolerance:.2g} is used")
    result = Text("PASS", "bold green") if passed else Text("FAIL: the error is over the bound", "bold red")
    table.add_row("result", result)
    console.print(table)
    return passed


def print_manifest(console: Console, manifest: Manifest, checksum: str) -> None:
    """Print what a library says of itself, and whether this machine can run it."""
    table = facts()
    for label, text in spec_rows(manifest.spec):
        table.add_row(label, text)
    table.add_row("pipeline", manifest.pipeline)
    table.add_row("lse", manifest.lse)
    table.add_row("empty", manifest.empty_rows)
    table.add_row("target", f"{target_text(manifest.target)}, {manifest.machine}")
    table.add_row("features", " ".join(manifest.features) or "none")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())))
    table.add_row("kernels", f"SHA-256 {manifest.kernels}")
    table.add_row("library", f"SHA-256 {checksum}, as it should be")
    unfit = manifest.unfit()
    table.add_row("loads", Text(f"no: {unfit}", "bold red") if unfit else "yes")
    console.print(table)


def print_verification(console: Console, module: Module, verification: Verification, command: str) -> None:
    """Print what Module.verify found; command is the one that verified, for the lines that draw a failure again."""
    table = facts()
    for label, text in spec_rows(module.spec):
        table.add_row(label, text)
    table.add_row("target", target_text(module.target))
    table.add_row("pipeline", module.pipeline)
    draws = counted(verification.draws, "draw")
    table.add_row("draws", f"{verification.draws:,} in {verification.seconds:.1f} s, seed {verification.seed}")
    of_out, of_lse = verification.out.of_tolerance, verification.lse.of_tolerance
    table.add_row("error", f"{verification.out.absolute:.2e} at most, against NumPy in float64")
    table.add_row("bounds", f"{of_out:.2g} of out's is used, {of_lse:.2g} of lse's")
    for failure in verification.failures[:_SHOWN_FAILURES]:
        table.add_row(f"draw {failure.draw}", failure.message)
    failed = len(verification.failures)
    result = Text("PASS", "bold green") if verification.passed else Text(f"FAIL: {failed:,} of {draws}", "bold red")
    table.add_row("result", result)
    console.print(table)
    for failure in verification.failures[:_SHOWN_FAILURES]:  # in whole lines, to be copied
        line = f"{command} --seed {failure.seed} --draw {failure.draw}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_code(console: Console, text: str, lexer: str) -> None:
    """Print text with colours on a terminal, and byte for byte elsewhere. Lines are never cut."""
    if console.is_terminal:
        console.print(Syntax(text, lexer, background_color="default").highlight(text), soft_wrap=True, end="")
    else:
        console.file.write(text)


def spec_rows(spec: PagedAttentionSpec) -> list[tuple[str, str]]:
    """What is said of a spec: rows of facts()."""
    heads = f"{counted(spec.num_heads, 'query head')} on {counted(spec.num_kv_heads, 'kv head')} of {spec.head_dim}"
    return [
        ("spec", f"{heads}, {spec.dtype} in, {spec.result_dtype} out"),
        ("cache", f"{spec.kv_layout}, blocks of {counted(spec.block_size, 'token')}"),
        ("tiles", f"head_tile {spec.head_tile}, batch_chunk {spec.batch_chunk}"),
    ]


def target_text(target: Mapping[str, Any]) -> str:
    """What is said of a TVM target."""
    if target["kind"] == "cuda":
        return f"cuda, {target['arch']}"
    return ", ".join([target["kind"], target["mcpu"], *_vector_extension(target)])


def facts() -> Table:
    """A table of two columns without lines: labels, and text that is folded."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", min_width=8)
    table.add_column(overflow="fold")
    return table


def _vector_extension(target: Mapping[str, Any]) -> list[str]:
    """The widest vector extension that a target states; none where its mcpu implies it."""
    stated = target.get("mattr", ())
    return [name for feature, name in _VECTOR_EXTENSIONS.items() if f"+{feature}" in stated][:1]


def counted(number: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _between(numbers: Sequence[int] | np.ndarray) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _range(begin: int, end: int) -> str:
    if end <= begin:
        return "none"
    return str(begin) if end - begin == 1 else f"{begin}-{end - 1}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms" if seconds < 0.1 else f"{seconds:,.3f} s"
