"""torch's scaled_dot_product_attention over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.inputs import Call
from benchmarks.peers.vllm_cpu import as_torch


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """The query heads of a group as the rows of one kv head: each key is read once for its group, nothing is copied."""
    torch.set_num_threads(call.num_threads)
    spec, lengths = call.case.spec, call.context_lens.tolist()
    key, value = (as_torch(call.contiguous(cache)) for cache in (call.key_cache, call.values))
    query = as_torch(call.query).unflatten(1, (spec.num_kv_heads, -1))  # [batch, num_kv_heads, group, head_dim]
    if len(set(lengths)) == 1:
        return lambda: scaled_dot_product_attention(query, key, value).flatten(1, 2)

    def run() -> torch.Tensor:
        one = [
            scaled_dot_product_attention(query[i : i + 1], key[i : i + 1, :, :n], value[i : i + 1, :, :n])
            for i, n in enumerate(lengths)
        ]
        return torch.cat(one).flatten(1, 2)

    return run
