"""AMD PACE's pool of slabs, from the wheel pace-vllm: the compiled operators alone, without vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.inputs import Call
from benchmarks.machine import cpu_flags
from benchmarks.peers import Unsupported
from benchmarks.peers.vllm_cpu import as_torch

_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # those that its backend for vLLM names


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """Its own cache, in blocks of the size that it chooses itself, filled by its own operator in one go."""
    spec = call.case.spec
    if spec.dtype != "bfloat16":
        raise Unsupported("bfloat16 alone")
    if spec.head_dim not in _HEAD_DIMS:
        raise Unsupported(f"head_dim of {', '.join(map(str, _HEAD_DIMS))} alone")
    if "avx512_bf16" not in cpu_flags():
        raise Unsupported("built for AVX512_BF16 alone, which this CPU lacks")
    torch.set_num_threads(call.num_threads)
    torch.ops.load_library(_library())
    block_size = torch.ops.pace.slab_autotune_block_size(spec.num_kv_heads, spec.head_dim)
    lengths, counts = call.context_lens.tolist(), call.case.query_counts.tolist()
    num_blocks = sum(-(-length // block_size) for length in lengths)
    pool = torch.classes.pace.SlabPool(num_blocks, spec.num_kv_heads, spec.head_dim, block_size)
    sequences = list(range(len(lengths)))
    for sequence, length in zip(sequences, lengths, strict=True):
        pool.create_sequence(sequence, length)
    slots = call.slots()
    tokens = (as_torch(cache.reshape(-1, *cache.shape[2:])[slots]) for cache in (call.key_cache, call.values))
    pool.cache_update(sequences, *tokens, lengths)
    query, scale, no_sinks = as_torch(call.query), call.scale, torch.empty(0, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        return pool.attention(sequences, query, counts, [], scale, 0, no_sinks)

    return run


def _library() -> str:
    package = importlib.util.find_spec("pace_vllm")
    if package is None or package.origin is None:
        raise ImportError("not installed")
    return str(Path(package.origin).parent / "lib/libpace_cpp.so")
