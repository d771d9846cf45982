"""Decode steps of generate_batch, transformers' continuous batching, on stock attention and on these kernels.

What is timed is a forward pass of the model in which each sequence has one token. Those before it, of the prompts, are
not run: the pages are filled with random numbers, which are the same for both.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.engines_models import Seconds, timed
from pa_compiler.integrations.transformers import disable, enable

CONTENDERS = ("continuous batching", "pa_compiler")
PAGE_SIZE, CHUNK = 256, 512
"""Tokens of a page, which is transformers' own choice, and of a forward pass of prompts."""


def decode(model: Any, contender: str, batch: int, context: int, steps: int) -> tuple[torch.Tensor, list[Seconds]]:
    """(logits of the first step, what each took) of so many steps after prompts of so many tokens.

    Raises:
        RuntimeError: there were fewer steps.
    """
    logits: list[torch.Tensor] = []
    took: list[Seconds] = []
    forward, filled = model.forward, False

    def watched(**arguments: Any) -> Any:
        nonlocal filled
        if not filled:
            filled = True
            arguments["cache"].cache_tensor.view(model.dtype).normal_(generator=torch.Generator().manual_seed(0))
        tokens = arguments["input_ids"].shape[1]
        if arguments["max_length_q"] > 1 or tokens != batch or len(took) == steps:
            kept = arguments.get("logits_to_keep")
            shape = (1, tokens if kept is None else len(kept), model.config.vocab_size)
            return CausalLMOutputWithPast(logits=torch.zeros(shape, dtype=model.dtype))
        found, seconds = timed(lambda: forward(**arguments))
        logits.append(found.logits)
        took.append(seconds)
        return found

    new = steps + 2 * (batch * context // CHUNK + batch)  # while the last prompts are read, the first ones are answered
    blocks = batch * -(-(context + new) // PAGE_SIZE)
    batching = ContinuousBatchingConfig(page_size=PAGE_SIZE, num_blocks=blocks, max_batch_tokens=CHUNK)
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    if contender == "pa_compiler":
        enable(model)
    model.forward = watched
    try:
        prompts = [[1 + index] * context for index in range(batch)]
        model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    finally:
        del model.forward
        if contender == "pa_compiler":
            disable(model)
    if len(took) < steps:
        raise RuntimeError(f"generate_batch: expected {steps} steps of {batch} sequences, got {len(took)}")
    return logits[0], took
