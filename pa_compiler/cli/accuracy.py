"""The accuracy command: what a type of cache costs, on drawn data or on a user's own keys and values."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

import pa_compiler
from pa_compiler.cli import printing
from pa_compiler.cli.options import Command, check_memory, check_takes_numpy, compared_numbers, replace, spec_options
from pa_compiler.cli.progress import step
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import accuracy, cases, inputs

_FILE = click.Path(exists=False, path_type=str)


@click.command("accuracy", cls=Command)
@spec_options
@click.option("--data", type=click.Choice(["plain", "outliers"]), default="plain", help="What is drawn.")
@click.option("--tokens", type=click.IntRange(min=1), default=4096, help="Tokens that are drawn.")
@click.option("--queries", type=click.IntRange(min=1), default=8, help="Queries that are drawn.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of what is drawn.")
@click.option("--keys", type=_FILE, help="Keys [tokens, num_kv_heads, head_dim]: a .npy, or FILE.safetensors:NAME.")
@click.option("--values", type=_FILE, help="Values [tokens, num_kv_heads, value_dim], likewise.")
@click.option("--query", type=_FILE, help="Queries [queries, num_heads, head_dim], likewise; drawn if not given.")
@click.option("--scale", type=float, show_default="1/sqrt(head_dim)", help="Factor of the scores.")
@click.option("--worst", type=click.IntRange(min=0), default=5, help="Tokens that are named.")
@click.option("--all", "every", is_flag=True, help="Compare all types of caches, one line for each.")
def accuracy_command(
    target: Any,
    pipeline: str,
    data: str,
    tokens: int,
    queries: int,
    seed: int,
    keys: str | None,
    values: str | None,
    query: str | None,
    scale: float | None,
    worst: int,
    every: bool,
    **_: Any,
) -> None:
    """Measure how far out and lse on a cache are from float64 on the keys and values that it was made of.

    By query head, with the tokens whose codes do the most to out. A command that runs decode: nothing is judged.
    """
    check_takes_numpy(target)
    spec = replace(cases.DEFAULT.spec)
    accuracy.check_spec(spec)
    _check_memory(spec, tokens, queries)
    found = accuracy.drawn(spec, tokens, queries, outliers=data == "outliers", seed=seed)
    if (keys is None) != (values is None):
        raise ValueError("keys: expected together with values, got one of the two")
    given = {"keys": keys, "values": values, "query": query}
    found = found._replace(**{name: load(name, path) for name, path in given.items() if path is not None})
    heads = inputs.head_arrays(np.random.default_rng((1, seed)), spec, queries)
    results = []
    for each in accuracy.variants(spec) if every else [spec]:
        with step(f"Compiling {each.kv_dtype or each.dtype}"):
            module = pa_compiler.compile(each, target, pipeline)
        results.append(accuracy.measure(module, found, scale=scale, num_worst=worst, **heads))
    console = Console()
    if every:
        printing.print_text(console, "\n".join(accuracy_table(results)) + "\n")
    else:
        _print(console, results[0])


def load(name: str, path: str) -> np.ndarray:
    """An array of a .npy file, or one by its name in a file of safetensors: FILE.safetensors:NAME.

    Raises:
        ValueError: there is no such file or array, or safetensors is not installed.
    """
    file, _, tensor = path.partition(".safetensors:")
    try:
        if tensor:
            found = importlib.import_module("safetensors.numpy").load_file(f"{file}.safetensors")
        else:
            with Path(path).open("rb") as opened:  # NumPy leaves a damaged .npz open
                found = np.load(opened, allow_pickle=False)
    except ImportError as error:
        raise ValueError(f"{name}: expected safetensors to be installed for {path}") from error
    except Exception as error:  # of a damaged file NumPy and safetensors may raise anything
        raise ValueError(f"{name}: expected an array in {path}: {error}") from error
    if tensor and tensor not in found:
        raise ValueError(f"{name}: expected one of {', '.join(sorted(found))} in {Path(file).name}, got {tensor!r}")
    if not tensor and not isinstance(found, np.ndarray):
        raise ValueError(f"{name}: expected a .npy, which is one array, got a .npz: {path}")
    return np.asarray(found[tensor] if tensor else found)


def _check_memory(spec: PagedAttentionSpec, tokens: int, queries: int) -> None:
    """Refuse more than memory has room for: float64 of the data, and of a query's scores on it and on the codes."""
    of_query = spec.num_heads * (spec.head_dim + spec.result_dim) + tokens // spec.block_size
    check_memory(8 * (2 * tokens * compared_numbers(spec) + queries * of_query))


def _print(console: Console, found: accuracy.Accuracy) -> None:
    rows = [
        (str(head), f"{out:.2e}", f"{lse:.2e}")
        for head, (out, lse) in enumerate(zip(found.out, found.lse, strict=True))
    ]
    rows.append(("all", f"{found.out_of_all:.2e}", f"{found.lse_of_all:.2e}"))
    lines = ["", *printing.text.table(("head", "out", "lse"), rows, gap=2).splitlines()]
    if found.worst:
        heads = ("token", "kv head", "of out", "key", "value")
        of_tokens = [
            (f"{each.token:,}", str(each.kv_head), *(f"{part:.2e}" for part in (each.share, each.key, each.value)))
            for each in found.worst
        ]
        lines += ["", *printing.text.table(heads, of_tokens, gap=2).splitlines()]
    printing.print_facts(
        console,
        [
            *printing.text.spec_rows(found.spec),
            ("data", f"{found.num_tokens:,} tokens, {found.num_queries:,} queries after them"),
            ("keys", f"{np.sqrt((found.keys**2).mean()):.2e} of their size is wrong, root mean square"),
            ("values", f"{np.sqrt((found.values**2).mean()):.2e}"),
        ],
    )
    printing.print_text(console, "\n  ".join(lines) + "\n")


def accuracy_table(results: list[accuracy.Accuracy]) -> list[str]:
    """Lines of a table of several types of caches: bytes of a token, and errors as fractions of out, and of lse."""
    rows = [
        (
            accuracy.name_of(each.spec),
            f"{each.spec.token_bytes:,}",
            f"{each.out_of_all:.1e}",
            f"{each.out.max():.1e}",
            f"{each.lse_of_all:.1e}",
        )
        for each in results
    ]
    return printing.text.table(("cache", "bytes a token", "out", "worst head", "lse"), rows, gap=2).splitlines()
