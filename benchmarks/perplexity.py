"""python -m benchmarks.perplexity TEXT: perplexity of a text for SmolLM2 and Gemma 3 with each type of cache.

In float32, through enable(): every token of a window is appended to the caches, and attends to what these hold of it
and of those before. Beside it are stock attention and our own on caches of float32. It writes perplexity_results.json,
of which `python -m benchmarks.accuracy` makes docs/accuracy.md. The models are those of `make test-engines`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from examples import demo
from pa_compiler.integrations.transformers import PagedCache, disable, enable
from pa_compiler.integrations.transformers.cache import Codes

RESULTS = Path(__file__).with_name("perplexity_results.json")
CACHES = {
    "float32": Codes(),
    "int8, token_head": Codes("int8"),
    "int4, token_head, rotated": Codes("int4"),
    "float8_e4m3fn, scale 1": Codes("float8_e4m3fn"),
    "int4, token_head, not rotated": Codes("int4", None, "none"),
    "float8_e5m2, scale 1": Codes("float8_e5m2"),
    "int8, token_head, rotated": Codes("int8", None, "hadamard"),
}
"""By what they are called in tables; the first is what the others are compared with."""


def main() -> None:
    """Measure, print, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of UTF-8, of which the first tokens are read")
    parser.add_argument("--name", help="what the text is called in the results; the name of the file if not given")
    parser.add_argument("--models", default="smollm2,gemma3")
    parser.add_argument("--windows", type=int, default=4, help="that the text is cut into, of so many tokens each")
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    results: dict[str, Any] = {"text": options.name or options.text.name, "models": {}}
    results |= {"windows": options.windows, "tokens": options.tokens, "torch": torch.__version__}
    results["transformers"] = transformers.__version__
    for name in options.models.split(","):
        tokenizer, model = load(name)
        ids = tokenizer(text)["input_ids"][: options.windows * options.tokens]
        windows = torch.tensor(ids).view(options.windows, options.tokens)
        for found in measure(name, model, windows):
            results["models"][name] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def load(name: str) -> tuple[Any, Any]:
    """Tokenizer and model, in float32."""
    if name == "smollm2":
        return demo.load(torch.float32)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    return importlib.import_module("gemma3").load(torch.float32)


def measure(name: str, model: Any, windows: torch.Tensor) -> Iterator[dict[str, Any]]:
    """What is known after each cache: by cache, of -log of probabilities the mean, and how they differ from float32."""
    found = {"stock attention, float32": likelihoods(model, windows, None)}
    enable(model)
    for cache, codes in CACHES.items():
        began = time.perf_counter()
        found[cache] = likelihoods(model, windows, codes)
        print(f"{name}, {cache}: {math.exp(found[cache].mean()):.4f}, {time.perf_counter() - began:.0f} s", flush=True)
        exact = found["float32"]
        yield {
            known: {
                "nats": float(each.mean()),
                "perplexity": math.exp(each.mean()),
                "ratio": math.exp((each - exact).mean()),
                "moved": float((each - exact).abs().mean()),
            }
            for known, each in found.items()
        }
    disable(model)


def likelihoods(model: Any, windows: torch.Tensor, codes: Codes | None) -> torch.Tensor:
    """-log of the probability of each token but the first of its window, float64."""
    found = []
    for window in windows:
        config = model.config.get_text_config(decoder=True)
        cache = None if codes is None else PagedCache(config.num_hidden_layers, len(window), codes)
        with torch.inference_mode():
            logits = model(window[None], past_key_values=cache, use_cache=cache is not None).logits[0, :-1]
        for rows, tokens in zip(logits.split(128), window[1:].split(128), strict=True):
            found.append(-rows.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0])
    return torch.cat(found)


if __name__ == "__main__":
    main()
