"""python -m benchmarks.engines: prefill and decode of models in transformers, on these kernels and on stock attention.

Stock attention is SDPA with a DynamicCache, which generate() takes by itself, with a StaticCache, and in continuous
batching. Contenders take turns. Their caches are filled with the same keys and values, and the logits of each are
compared with those of the first. Rates are written to a file after each case, so that a run can be taken up again:
--cases decode/smollm2/bfloat16/1/4096/8 measures one case.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines_continuous, machine
from benchmarks.engines_models import (
    CONTENDERS,
    MODELS,
    Seconds,
    empty_cache,
    filled_cache,
    forward,
    load,
    running,
    timed,
)
from benchmarks.engines_report import Case, parsed, print_tables, save
from examples import demo

ROUNDS, STEPS = {"smollm2": 5, "llama-1b": 3}, 2
"""Turns of decode, and steps of each."""
SHORT, MORE = 2048, 3
"""Below so many tokens of context there are so many times as many turns: they take little time, and differ little."""
LONG = {"smollm2": 2048, "llama-1b": 512}
"""Tokens of a prompt from which on there is one prefill, and from a quarter of it on two; of shorter prompts five."""
ERRORS = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.05}
"""The rms error of logits against the first contender's that is allowed, over their standard deviation: it finds
nonsense. StaticCache had 0.14 in bfloat16. Tests compare in float32."""

Turns = dict[str, list[Seconds]]
Logits = dict[str, list[torch.Tensor]]
Rates = dict[str, dict[str, list[float]]]
"""Tokens/s by contender and by "wall" or "cpu", for each turn."""


def main() -> None:
    """Measure the cases that are asked for, and print the tables of all that the file has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="such as decode/smollm2/bfloat16/1/4096/8; by default those below")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences that decode together")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="bfloat16", choices=list(ERRORS))
    parser.add_argument("--json", type=Path, help="the file; by default the one in benchmarks/results of such cores")
    parser.add_argument("--print", action="store_true", help="print the tables, and measure nothing")
    options = parser.parse_args()
    options.json = options.json or machine.results("engines")
    cases = [] if options.print else [parsed(each) for each in options.cases] if options.cases else list(_all(options))
    for (name, dtype), group in itertools.groupby(cases, lambda case: (case.model, case.dtype)):
        with demo.progress(f"loading {name} in {dtype}"):
            model = load(name, getattr(torch, dtype))
        for case in group:
            with demo.progress(str(case)):
                save(options.json, case, measure(model, case))
    print_tables(options.json)


def _all(options: argparse.Namespace) -> Any:
    for model in options.models:
        for threads, context in itertools.product(options.threads, options.contexts):
            yield Case("prefill", model, options.dtype, threads, context, 1)
            for batch in options.batches:
                yield Case("decode", model, options.dtype, threads, context, batch)
            if model == "smollm2" and context >= 1024:
                yield Case("continuous", model, options.dtype, threads, context, max(options.batches))


def measure(model: Any, case: Case) -> Rates:
    """Tokens/s of a case, on its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.inference_mode():
            tokens, found = {"prefill": _prefill, "decode": _decode, "continuous": _continuous}[case.what](model, case)
    finally:
        torch.set_num_threads(before)
    return {
        each: {"wall": [tokens / seconds.wall for seconds in turns], "cpu": [tokens / seconds.cpu for seconds in turns]}
        for each, turns in found.items()
    }


def _prefill(model: Any, case: Case) -> tuple[int, Turns]:
    """(tokens of a turn, turns), of one sequence."""
    turns: Turns = {each: [] for each in CONTENDERS}
    ids = torch.randint(model.config.vocab_size, (1, case.context), generator=torch.Generator().manual_seed(0))
    for each in CONTENDERS:  # to compile, and to warm up
        with running(model, each):
            forward(model, ids[:, :64], empty_cache(each, model, 64))
    logits: Logits = {each: [] for each in CONTENDERS}
    long = LONG[case.model]
    for _ in range(1 if case.context >= long else 2 if case.context >= long // 4 else 5):
        for each in CONTENDERS:
            cache = empty_cache(each, model, case.context)
            with running(model, each):
                found, seconds = timed(functools.partial(forward, model, ids, cache))
            logits[each].append(found)
            turns[each].append(seconds)
    _compare(model, logits)
    return case.context, turns


def _decode(model: Any, case: Case) -> tuple[int, Turns]:
    """The same of sequences that have a context each; all of them decode the same token."""
    turns: Turns = {each: [] for each in CONTENDERS}
    rounds = ROUNDS[case.model] * (MORE if case.context < SHORT else 1)
    columns = case.context + STEPS * (rounds + 1)
    caches = {each: filled_cache(each, model, case.batch, case.context, columns) for each in CONTENDERS}
    ids = torch.ones(case.batch, 1, dtype=torch.long)

    def steps(cache: Any) -> torch.Tensor:
        for _ in range(STEPS):
            logits = forward(model, ids, cache)
        return logits

    logits: Logits = {each: [] for each in CONTENDERS}
    for turn in range(rounds + 1):
        for each in CONTENDERS:
            with running(model, each):
                found, seconds = timed(functools.partial(steps, caches[each]))
            logits[each].append(found)
            if turn:  # the first one warms up
                turns[each].append(seconds)
    _compare(model, logits)
    return STEPS * case.batch, turns


def _continuous(model: Any, case: Case) -> tuple[int, Turns]:
    """The same of steps of generate_batch."""
    turns: Turns = {each: [] for each in engines_continuous.CONTENDERS}
    logits: Logits = {each: [] for each in turns}
    for _ in range(2):
        for each, kept in turns.items():
            first, found = engines_continuous.decode(model, each, case.batch, case.context, STEPS + 1)
            logits[each].append(first)
            kept.extend(found[1:])  # the first one warms up
    _compare(model, logits)
    return case.batch, turns


def _compare(model: Any, logits: Logits) -> None:
    """Check what contenders computed in all turns against the first one's.

    Raises:
        AssertionError: an rms error is larger than that of ERRORS.
    """
    limit, first = ERRORS[str(model.dtype).removeprefix("torch.")], next(iter(logits))
    stacked = {contender: torch.stack(each).float() for contender, each in logits.items()}
    for contender, each in stacked.items():
        error = ((each - stacked[first]).square().mean().sqrt() / stacked[first].std()).item()
        if not error <= limit:
            raise AssertionError(f"{contender}: expected logits within {limit} of {first}'s, got {error:.3g}")


if __name__ == "__main__":
    main()
