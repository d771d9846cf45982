"""python -m benchmarks.engines: prefill and decode of SmolLM2 in transformers, on these kernels and on stock attention.

Stock attention is SDPA with a DynamicCache, which generate() takes by itself, and with a StaticCache. A cache of
several sequences is that of one, copied, and they all decode the same token. Contenders take turns, and the logits of
each are compared with those of the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from examples import demo
from pa_compiler.integrations.transformers import PagedCache, disable, enable

CONTENDERS = ("DynamicCache", "StaticCache", "pa_compiler")
ROUNDS, STEPS = 7, 2
LONG = 2048
"""Tokens of a prompt from which on there is one prefill, and no second one."""
ERRORS = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.05}
"""The rms error of logits against the first contender's that is allowed, over their standard deviation: it finds
nonsense. StaticCache had 0.14 in bfloat16. Tests compare in float32."""
TEXT = Path(__file__).parents[1] / "docs" / "reference.md"
"""What prompts are of."""


def main() -> None:
    """Print a row for each context and batch: tokens/s of prefill (of one sequence) and of decode, with quartiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of a prompt")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 8],
        help="sequences that decode together: each a multiple of the one before",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="bfloat16", choices=list(ERRORS))
    options = parser.parse_args()
    with demo.progress(f"loading SmolLM2 in {options.dtype}"):
        tokenizer, model = demo.load(getattr(torch, options.dtype))
    text = tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"]
    print(f"torch {torch.__version__}, {options.dtype}, tokens/s: median (quartiles)")
    print("| threads | context | what | " + " | ".join(CONTENDERS) + " |")
    print("| --- " * (3 + len(CONTENDERS)) + "|")
    with torch.inference_mode():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for context in options.contexts:
                for what, found in measure(model, text[:, :context], options.batches).items():
                    cells = " | ".join(_cell(found[each]) for each in CONTENDERS)
                    print(f"| {threads} | {context} | {what} | {cells} |", flush=True)


def measure(model: Any, ids: torch.Tensor, batches: list[int]) -> dict[str, dict[str, list[float]]]:
    """Tokens/s of each contender by what is measured: prefill of one sequence, and decode of each batch."""
    context = ids.shape[1]
    columns = context + STEPS * (ROUNDS + 1) * len(batches)
    found: dict[str, dict[str, list[float]]] = {"prefill": {each: [] for each in CONTENDERS}}
    caches = {}
    for each in CONTENDERS:  # to compile, and to warm up
        _timed(model, each, _cache(each, model, columns), ids[:, :64])
    for _ in range(1 if context >= LONG else 2):
        logits = {}
        for each in CONTENDERS:
            caches[each] = _cache(each, model, columns)
            seconds, logits[each] = _timed(model, each, caches[each], ids)
            found["prefill"][each].append(context / seconds)
        _compare(model, logits)
    for before, batch in zip([1, *batches], batches, strict=False):
        caches = {each: _repeated(cache, batch // before, model.config, columns) for each, cache in caches.items()}
        rows = found[f"decode, batch {batch}"] = {each: [] for each in CONTENDERS}
        for turn in range(ROUNDS + 1):
            logits = {}
            for each, cache in caches.items():
                steps = [_timed(model, each, cache, ids[:, step : step + 1].expand(batch, 1)) for step in range(STEPS)]
                logits[each] = steps[-1][1]
                if turn:  # the first one warms up
                    rows[each].append(STEPS * batch / sum(seconds for seconds, _ in steps))
            _compare(model, logits)
    return found


def _timed(model: Any, contender: str, cache: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(seconds, logits of the last tokens) of a forward pass."""
    if contender == "pa_compiler":
        enable(model)
    try:
        begin = time.perf_counter()
        logits = model(ids, cache=cache, logits_to_keep=1).logits
        return time.perf_counter() - begin, logits
    finally:
        if contender == "pa_compiler":
            disable(model)


def _cache(contender: str, model: Any, columns: int) -> Any:
    """An empty one with room for so many tokens."""
    makers: dict[str, Callable[[], Any]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=columns),
        "pa_compiler": lambda: PagedCache(model.config.num_hidden_layers, columns),
    }
    return makers[contender]()


def _repeated(cache: Any, times: int, config: Any, columns: int) -> Any:
    """The cache of so many times as many sequences. transformers' StaticCache has no such call: it is made anew."""
    if not isinstance(cache, StaticCache):
        cache.batch_repeat_interleave(times)
        return cache
    made = StaticCache(config=config, max_cache_len=columns)
    for new, old in zip(made.layers, cache.layers, strict=True):
        new.update(*(each[:, :, : old.get_seq_length()].repeat_interleave(times, 0) for each in (old.keys, old.values)))
    return made


def _compare(model: Any, logits: dict[str, torch.Tensor]) -> None:
    """Check what contenders computed against the first one's.

    Raises:
        AssertionError: an rms error is larger than that of ERRORS.
    """
    expected = logits[CONTENDERS[0]].float()
    limit = ERRORS[str(model.dtype).removeprefix("torch.")]
    for contender, each in logits.items():
        error = ((each.float() - expected).square().mean().sqrt() / expected.std()).item()
        if not error <= limit:
            raise AssertionError(f"{contender}: expected logits within {limit} of {CONTENDERS[0]}'s, got {error:.3g}")


def _cell(rates: list[float]) -> str:
    if len(rates) == 1:
        return f"{rates[0]:.1f}"
    lower, median, upper = statistics.quantiles(rates, n=4, method="inclusive")
    return f"{median:.1f} ({lower:.1f}-{upper:.1f})"


if __name__ == "__main__":
    main()
