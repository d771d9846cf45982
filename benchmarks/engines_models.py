"""The models of benchmarks.engines, their caches, what these are filled with, and the time that a call takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache, StaticCache

from examples import demo
from pa_compiler.integrations.transformers import PagedCache, disable, enable

CONTENDERS = ("DynamicCache", "StaticCache", "pa_compiler")
MODELS = ("smollm2", "llama-1b")
PREFIX = 256
"""Tokens that a model reads to fill a cache. With random numbers there, roundings would decide what is seen."""
_LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""The shape of Llama 3.2 1B."""


def load(name: str, dtype: torch.dtype) -> Any:
    """SmolLM2-135M-Instruct, or a model of Llama 3.2 1B's shape with random weights."""
    if name == "smollm2":
        return demo.load(dtype)[1]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA_1B)).to(dtype).eval()
    model.to_empty(device="cpu")
    model.tie_weights()
    numbers = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for begin in range(0, len(flat), len(numbers)):  # drawing a billion numbers would take a minute
                flat[begin : begin + len(numbers)] = numbers[: len(flat) - begin]
            if parameter.dim() == 1:
                parameter.fill_(1.0)
    rotary = model.model.rotary_emb
    rotary.inv_freq, rotary.attention_scaling = rotary.compute_default_rope_parameters(model.config)
    return model


def empty_cache(contender: str, model: Any, columns: int) -> Any:
    """One with room for so many tokens."""
    makers: dict[str, Callable[[], Any]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=columns),
        "pa_compiler": lambda: PagedCache(model.config.num_hidden_layers, columns),
    }
    return makers[contender]()


def prefix(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of PREFIX tokens, [1, num_kv_heads, PREFIX, head_dim], for each layer."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(model.config.vocab_size, (1, PREFIX), generator=torch.Generator().manual_seed(0))
    forward(model, ids, cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def filled_cache(contender: str, model: Any, batch: int, context: int, columns: int) -> Any:
    """One that has so many tokens, in all sequences and for all contenders the same: the prefix again and again."""
    cache = empty_cache(contender, model, columns)
    pairs = prefix(model)
    if contender == "pa_compiler":  # its layers have memory when a model has called them
        with running(model, contender):
            forward(model, torch.zeros(batch, 1, dtype=torch.long), cache)
    for index, (layer, pair) in enumerate(zip(cache.layers, pairs, strict=True)):
        repeated = [each.repeat(1, 1, -(-context // PREFIX), 1)[:, :, :context] for each in pair]
        if contender == "pa_compiler":
            layer.columns = context
            layer.append(layer.module, *(each.expand(batch, -1, -1, -1) for each in repeated), None)
        else:
            cache.update(*(each.expand(batch, -1, -1, -1) for each in repeated), index)
    return cache


def forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of the last tokens of a forward pass."""
    logits: torch.Tensor = model(ids, cache=cache, logits_to_keep=1).logits
    return logits


@contextlib.contextmanager
def running(model: Any, contender: str) -> Iterator[None]:
    """Have a model run on what is named."""
    if contender == "pa_compiler":
        enable(model)
    try:
        yield
    finally:
        if contender == "pa_compiler":
            disable(model)


class Seconds(NamedTuple):
    """What a call took: on the clock, and of all threads of the process together."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What a call returned, and what it took."""
    begin = time.perf_counter(), time.process_time()
    value = call()
    return value, Seconds(time.perf_counter() - begin[0], time.process_time() - begin[1])
