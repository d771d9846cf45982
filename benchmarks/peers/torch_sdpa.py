"""torch's scaled_dot_product_attention over contiguous keys and values."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.inputs import Call
from benchmarks.peers.vllm_cpu import as_torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]
"""query [sequences, heads, rows, head_dim], key and value with as many heads or fewer, a mask, whether it is causal."""

_FEW = 16  # query tokens of a sequence, up to which a group's rows go together: faster, as measured


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """With torch's own operator."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        fewer = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=fewer)

    return prepare_with(call, attend)


def prepare_with(call: Call, attend: Attend) -> Callable[[], torch.Tensor]:
    """One call for each run of sequences that are alike. Masks are made once: an engine has them for all layers."""
    torch.set_num_threads(call.num_threads)
    lengths, counts = call.context_lens.tolist(), call.case.query_counts.tolist()
    key, value = (as_torch(call.contiguous(cache)) for cache in (call.key_cache, call.values))
    query, starts = as_torch(call.query), call.starts.tolist()
    calls: list[Callable[[], torch.Tensor]] = []
    for (length, count), run_of in itertools.groupby(range(len(lengths)), key=lambda i: (lengths[i], counts[i])):
        first, *others = run_of
        end = first + 1 + len(others)
        alike = query[starts[first] : starts[end]].unflatten(0, (end - first, count))
        of_run = (alike, key[first:end, :, :length], value[first:end, :, :length])
        calls.append(functools.partial(_grouped if count <= _FEW else _by_head, attend, *of_run, _mask(*of_run[:2])))
    return lambda: calls[0]() if len(calls) == 1 else torch.cat([each() for each in calls])


def _mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """What query tokens see, aligned at the last key, to be added to scores; None where is_causal says the same."""
    count, length = query.shape[1], key.shape[2]
    if count == 1 or _FEW < count == length:
        return None
    seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    mask = torch.zeros(count, length, dtype=query.dtype).masked_fill(~seen, float("-inf"))
    return mask.repeat(query.shape[2] // key.shape[1], 1) if count <= _FEW else mask


def _grouped(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The query heads of a group as the rows of one kv head: each key is read once for its group, nothing is copied."""
    sequences, count, num_heads, head_dim = query.shape
    rows = query.view(sequences, count, key.shape[1], -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = attend(rows, key, value, mask, False)
    return out.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).reshape(sequences * count, num_heads, -1)


def _by_head(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    return attend(query.transpose(1, 2), key, value, mask, mask is None).transpose(1, 2).flatten(0, 1)
