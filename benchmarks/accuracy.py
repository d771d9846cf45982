"""python -m benchmarks.accuracy: writes docs/accuracy.md, what each type of cache costs.

On drawn keys and values, which it measures as `pa-compiler accuracy --all` does, and on models, from what
benchmarks.perplexity has left. With --models-only it measures nothing and takes accuracy_results.json for the former.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.verification import accuracy

RESULTS = Path(__file__).with_name("accuracy_results.json")
PERPLEXITY = Path(__file__).with_name("perplexity_results.json")
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
SPEC = PagedAttentionSpec(8, 2, 128, 32, "bfloat16", "float32")
TOKENS, QUERIES = 4096, 8
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}


def main() -> None:
    """Measure, keep what was found, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models-only", action="store_true")
    if not parser.parse_args().models_only:
        RESULTS.write_text(json.dumps(drawn(), indent=1) + "\n")
    models = json.loads(PERPLEXITY.read_text()) if PERPLEXITY.exists() else None
    PAGE.write_text(page(json.loads(RESULTS.read_text()), models))


def drawn() -> list[dict[str, Any]]:
    """A row for each type of cache, on plain data and on data with outliers."""
    data = {kind: accuracy.drawn(SPEC, TOKENS, QUERIES, outliers=kind == "outliers") for kind in ("plain", "outliers")}
    rows = []
    for spec in accuracy.variants(SPEC):
        module = pa_compiler.compile(spec)
        row: dict[str, Any] = {"cache": accuracy.name_of(spec), "bytes": spec.token_bytes}
        for kind, each in data.items():
            found = accuracy.measure(module, each)
            row |= {f"out, {kind}": found.out_of_all, f"lse, {kind}": found.lse_of_all}
        rows.append(row)
        print(row, flush=True)
    return rows


def page(rows: list[dict[str, Any]], models: dict[str, Any] | None) -> str:
    """The text of docs/accuracy.md."""
    heads = ("cache", "bytes a token", "out, plain", "out, outliers", "lse, plain", "lse, outliers")
    columns = ("out, plain", "out, outliers", "lse, plain", "lse, outliers")
    of_types = [(each["cache"], f"{each['bytes']:,}", *(f"{each[name]:.1e}" for name in columns)) for each in rows]
    parts = [
        "# What a type of cache costs\n",
        _paragraph(
            "Written by `python -m benchmarks.accuracy`, and the part on models from the results of `python -m "
            "benchmarks.perplexity TEXT`. `pa-compiler accuracy` measures the same on keys and values of your own."
        ),
        "## Drawn keys and values\n",
        _paragraph(
            f"{SPEC.num_heads} query heads on {SPEC.num_kv_heads} kv heads of {SPEC.head_dim}, {SPEC.dtype}, "
            f"{TOKENS:,} tokens and {QUERIES} queries after them, normal numbers of variance 1; with outliers, "
            f"{accuracy.OUTLIERS} elements of each head of the keys and of the values are {accuracy.OUTLIER_SIZE:g} "
            "times as large. `out` is the root mean square of the error of out as a fraction of that of out, beside "
            "float64 on the keys and values as they were; `lse` that of the error of lse, in nats. Scales are counted "
            "in the bytes, of all kv heads. Those of float8 are the largest magnitude of the data over the type's."
        ),
        _table(heads, of_types),
    ]
    if models:
        parts += _of_models(models)
    return "\n".join(parts)


def _of_models(models: dict[str, Any]) -> list[str]:
    """Perplexities of models."""
    measured = models["models"]
    caches = list(dict.fromkeys(cache for found in measured.values() for cache in found))
    heads = ["cache"]
    for name in measured:
        heads += [MODELS[name], "beside float32", "moved"]
    rows = []
    for cache in caches:
        row = [cache]
        for found in measured.values():
            each = found.get(cache)
            row += ["", "", ""] if each is None else [f"{each['perplexity']:.3f}", _percent(each["ratio"]), _nats(each)]
        rows.append(row)
    count = f"{models['windows']} windows" if models["windows"] > 1 else "one window"
    return [
        "## Models\n",
        _paragraph(
            f"Perplexity of the first {models['windows'] * models['tokens']:,} tokens of {models['text']}, in {count} "
            f"of {models['tokens']:,} tokens, through the adapter of transformers {models['transformers']} on torch "
            f"{models['torch']}, in float32: `enable(model, kv_dtype=...)`. Every token attends to what the caches "
            "hold of it and of those before it in its window. *Beside float32* is the perplexity over that of our own "
            "caches of float32, and *moved* the mean magnitude of what the negative logarithm of a token's probability "
            "changes by, in nats: the first may be good by luck, the second may not. Scales of float8 are 1."
        ),
        _table(heads, rows),
    ]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 130, break_on_hyphens=False) + "\n"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.2f} %"


def _nats(each: dict[str, float]) -> str:
    return f"{each['moved']:.1e}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
