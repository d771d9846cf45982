"""What is timed: the shapes and sizes, by name."""

from __future__ import annotations

import dataclasses

from pa_compiler import PagedAttentionSpec
from pa_compiler.verification.cases import Case

_VARIABLE = (33, 8192, 4096, 127, 1, 2048, 6000, 64)


def _case(heads: str, head_dim: int, block_size: int, dtype: str, batch: int, *seq_lens: int) -> Case:
    num_heads, num_kv_heads = map(int, heads.split("/"))
    spec = PagedAttentionSpec(num_heads, num_kv_heads, head_dim, block_size, dtype)
    return Case(spec, batch, seq_lens, scale=None)


CASES = {
    "16/1-bf16": _case("16/1", 128, 128, "bfloat16", 8, 8192),
    "16/1-f32": _case("16/1", 128, 128, "float32", 8, 8192),
    "16/1-var-bf16": _case("16/1", 128, 128, "bfloat16", 16, *_VARIABLE),
    "32/8-b16-bf16": _case("32/8", 128, 16, "bfloat16", 8, 2048),
    "32/8-bf16": _case("32/8", 128, 32, "bfloat16", 8, 2048),
    "32/8-b16-f32": _case("32/8", 128, 16, "float32", 8, 2048),
    "32/8-f32": _case("32/8", 128, 32, "float32", 8, 2048),
    "64/8-bf16": _case("64/8", 128, 32, "bfloat16", 4, 2048),
    "32/32-bf16": _case("32/32", 128, 32, "bfloat16", 4, 1024),
    "32/32-f32": _case("32/32", 128, 32, "float32", 4, 1024),
    "64/1-bf16": _case("64/1", 128, 64, "bfloat16", 4, 8192),
}
"""The shapes of common models, as query heads / kv heads."""

MORE_CASES = {
    "24/8-bf16": _case("24/8", 128, 32, "bfloat16", 8, 2048),  # groups of 3, 5, 6, 7, 12, 24
    "40/8-bf16": _case("40/8", 128, 32, "bfloat16", 8, 2048),
    "48/8-bf16": _case("48/8", 128, 32, "bfloat16", 8, 2048),
    "28/4-bf16": _case("28/4", 128, 32, "bfloat16", 8, 2048),
    "48/4-bf16": _case("48/4", 128, 32, "bfloat16", 8, 2048),
    "48/2-bf16": _case("48/2", 128, 32, "bfloat16", 8, 4096),
    "32/8-d64-bf16": _case("32/8", 64, 32, "bfloat16", 8, 4096),
    "32/8-d80-bf16": _case("32/8", 80, 32, "bfloat16", 8, 4096),
    "32/8-d96-bf16": _case("32/8", 96, 32, "bfloat16", 8, 2048),
    "32/8-d192-bf16": _case("32/8", 192, 32, "bfloat16", 4, 2048),
    "32/8-d256-bf16": _case("32/8", 256, 32, "bfloat16", 4, 2048),
    "28/4-f32": _case("28/4", 128, 32, "float32", 8, 2048),
    "32/8-d80-f32": _case("32/8", 80, 32, "float32", 8, 2048),
}
"""Other groups and head sizes: where a library has no kernel of its own for them."""

_LENGTHS = {1: (1, 8, 32, 128), 8: (1, 8, 32)}
"""Of multi-head latent attention: by the batch, thousands (1024) of tokens of context."""

MLA_CASES = {
    f"mla-{heads}-{short}-{batch}x{length}k": Case(
        PagedAttentionSpec(heads, 1, 576, 16, dtype, value_dim=512, shared_kv=True), batch, (1024 * length,), scale=None
    )
    for heads in (16, 64, 128)
    for dtype, short in (("bfloat16", "bf16"), ("float32", "f32"))
    for batch, lengths in _LENGTHS.items()
    for length in lengths
}
"""Multi-head latent attention of DeepSeek-V2 and V3, 128 query heads on one or more devices, in the one block size that
vLLM's kernel takes. As large as they are: whether a sequence of 1024 tokens stays in the cache is part of the case."""

CACHED_CASES = {"16/1-f32-cached": _case("16/1", 128, 128, "float32", 1, 2048)}
"""Kept as small as they are, so that keys and values stay in the last-level cache: 2 MB."""

ALL_CASES = {**CASES, **MORE_CASES, **MLA_CASES, **CACHED_CASES}


def sized(name: str, cache_bytes: int) -> Case:
    """A case by its name, at the size at which it is measured on a machine with such a last-level cache."""
    case = ALL_CASES[name]
    return case if name in CACHED_CASES or name in MLA_CASES else beyond_cache(case, cache_bytes)


def beyond_cache(case: Case, cache_bytes: int) -> Case:
    """The case with its batch multiplied until its keys and values are at least four times as large as the cache."""
    factor = -(-4 * cache_bytes // case.kv_bytes)
    return dataclasses.replace(case, batch=case.batch * max(1, factor))
