"""Decode steps of generate_batch, transformers' continuous batching, on stock attention and on these kernels.

What is timed is a forward pass of the model in which each sequence has one token. Those before it, of the prompts, are
not run: each page is filled with the same prefix of a sequence, and the token that they give is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.engines_models import PREFIX, Seconds, prefix, running, timed

CONTENDERS = ("continuous batching", "pa_compiler")
PAGE_SIZE, CHUNK = PREFIX, 512
"""Tokens of a page, as many as transformers takes by itself, and of a forward pass of prompts."""


def decode(model: Any, contender: str, batch: int, context: int, steps: int) -> tuple[torch.Tensor, list[Seconds]]:
    """(logits of the first step, what each took) of so many steps after prompts of so many tokens.

    Raises:
        RuntimeError: there were fewer steps.
    """
    logits: list[torch.Tensor] = []
    took: list[Seconds] = []
    forward, pairs, filled = model.forward, prefix(model), False

    def watched(**arguments: Any) -> Any:
        nonlocal filled
        if not filled:
            filled = True
            _fill(arguments["cache"], pairs)
        tokens = arguments["input_ids"].shape[1]
        if arguments["max_length_q"] > 1 or tokens != batch or len(took) == steps:
            kept = arguments.get("logits_to_keep")
            logits_of_one = torch.zeros(1, tokens if kept is None else len(kept), model.config.vocab_size)
            logits_of_one[:, :, 1] = 1
            return CausalLMOutputWithPast(logits=logits_of_one)
        found, seconds = timed(lambda: forward(**arguments))
        logits.append(found.logits)
        took.append(seconds)
        return found

    new = steps + 2 * (batch * context // CHUNK + batch)  # while the last prompts are read, the first ones are answered
    blocks = 2 * batch * -(-(context + new) // PAGE_SIZE)  # with fewer, the last prompts wait for some to be answered
    batching = ContinuousBatchingConfig(page_size=PAGE_SIZE, num_blocks=blocks, max_batch_tokens=CHUNK)
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [[1 + index] * context for index in range(batch)]
    model.forward = watched
    try:
        with running(model, contender):
            model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    finally:
        del model.forward
    if len(took) < steps:
        raise RuntimeError(f"generate_batch: expected {steps} steps of {batch} sequences, got {len(took)}")
    return logits[0], took


def _fill(cache: Any, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Have every page of a layer be its keys or values of the prefix."""
    for index, pair in enumerate(pairs):
        pages = cache.layer_to_allocator[index].get_cache_for_block_table(index)
        for each, numbers in zip(pages, pair, strict=True):
            each[:: 2 * len(pairs)] = numbers[0].transpose(0, 1)  # pages of all layers lie in one row
