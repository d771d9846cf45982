"""torch.nn.attention.varlen on CPUs: its two operators, which torch has for GPUs alone, on these kernels.

Specs are compiled when they are first met, and kept. Keys and values that are not paged are handed over as a cache of
blocks of one token. lse of a query token that sees no key is -inf.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

from pa_compiler.integrations import modules, versions
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

_MOST_WINDOW = 2**30
"""Of a spec; one that sees more sees everything."""

_NAMES = {
    "query_start_loc": "cu_seq_q",
    "context_lens": "seqused_k",
    "key_cache": "key",
    "value_cache": "value",
    "dtype: expected one": "query: expected dtype one",
}
"""What arguments of attend and fields of specs are called in torch, for the messages of errors."""

_NAME = re.compile("|".join(rf"\b{name}\b" for name in _NAMES))

_enabled: list[torch.library.Library] = []
"""The library that holds the registrations, as long as they are to hold."""


def enable_varlen_attention(*modules_to_use: Module) -> None:
    """Give varlen_attn and varlen_attn_out of torch.nn.attention.varlen a kernel for CPUs.

    Covered are float32, float16 and bfloat16, paged K/V (block_table with seqused_k) of any page size and plain ones
    (cu_seq_k, and seqused_k beside it), groups of heads, scale, lse, windows (left, 0), (left, -1), (-1, 0) and
    (-1, -1), and torch.compile. A query token is counted from its sequence's end, as on a GPU. Results do not depend on
    the batch, whatever num_splits is; max_q and max_k are not looked at. There is no gradient.

    Args:
        *modules_to_use: Modules with attend to take for their specs, so that nothing is compiled for these.

    Raises:
        RuntimeError: torch is of a version whose operators are not known.
        TypeError: one of modules_to_use is no Module.
        ValueError: one has no attend.
    """
    versions.check("torch", torch.__version__, versions.TORCH_VARLEN, "torch.nn.attention.varlen")
    importlib.import_module("torch.nn.attention.varlen")  # defines the operators
    modules.keep(*modules_to_use)
    if not _enabled:
        library = torch.library.Library("torch_attn", "IMPL")
        library.impl("_varlen_attn", _varlen_attn, "CPU")
        library.impl("_varlen_attn_out", _varlen_attn_out, "CPU")
        _enabled.append(library)


def disable_varlen_attention() -> None:
    """Take the kernels for CPUs away again: torch is as it was."""
    while _enabled:
        _enabled.pop()._destroy()


def _varlen_attn(query: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch_attn::_varlen_attn: out, lse [num_heads, tokens], and the state of a generator that nothing uses."""
    out = torch.empty_like(query)
    return out, _varlen_attn_out(out, query, *arguments), torch.zeros(2, dtype=torch.uint64)


def _varlen_attn_out(
    out: Any,
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch_attn::_varlen_attn_out: writes out, and returns lse [num_heads, tokens]."""
    window, causal = _seen(window_size, is_causal)
    if block_table is None:
        key, value, block_table, seqused_k = as_blocks(key, value, cu_seq_k, seqused_k)
    elif seqused_k is None:
        raise ValueError("seqused_k: expected the lengths of the sequences beside block_table, got None")
    for name, tensor, axes in (("query", query, 3), ("key", key, 4), ("value", value, 4)):
        if tensor.dim() != axes:
            raise ValueError(f"{name}: expected {axes} axes, got shape {list(tensor.shape)}")
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(f"value: expected {key.shape[-1]} elements as in key, got {value.shape[-1]}")
    try:
        module = _module(query.shape[1], key.shape[2], key.shape[3], key.shape[1], query.dtype, window)
        arrays = (query, key, value, block_table, seqused_k, cu_seq_q)
        _, lse = module.attend(*arrays, scale, out, causal=causal, return_lse=True)
    except (IndexError, TypeError, ValueError) as error:
        raise type(error)(_NAME.sub(lambda found: _NAMES[found[0]], str(error))) from error
    return lse.t().contiguous()


def _seen(window_size: list[int] | None, is_causal: bool) -> tuple[int | None, bool]:
    """The window of a spec, and whether attend is causal.

    Raises:
        ValueError: a query token would see some keys after its own and not all.
    """
    left, right = window_size or (-1, -1)
    right = 0 if is_causal else right
    if left < -1 or right not in (-1, 0):
        raise ValueError(f"window_size: expected (left, 0) or (left, -1) with left from -1 on, got ({left}, {right})")
    return None if left == -1 or left >= _MOST_WINDOW else left + 1, right == 0


def as_blocks(
    key: torch.Tensor, value: torch.Tensor, cu_seq_k: torch.Tensor | None, seqused_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, num_kv_heads, head_dim] as caches of blocks of one token, with a table and lengths.

    Raises:
        ValueError: cu_seq_k does not go from 0 up to at most the tokens, or seqused_k is longer than it says.
    """
    if cu_seq_k is None:
        raise ValueError("cu_seq_k: expected where sequences begin, since there is no block_table, got None")
    room = cu_seq_k.diff()
    if cu_seq_k.dim() != 1 or not len(room) or cu_seq_k[0] < 0 or (room < 0).any() or cu_seq_k[-1] > len(key):
        raise ValueError(f"cu_seq_k: expected [batch + 1], rising, in [0, {len(key)}], got {cu_seq_k.tolist()}")
    lens = room if seqused_k is None else seqused_k
    if seqused_k is not None and (lens.shape != room.shape or (lens > room).any()):
        raise ValueError(f"seqused_k: expected at most {room.tolist()}, as cu_seq_k says, got {lens.tolist()}")
    table = cu_seq_k[:-1, None] + torch.arange(int(room.max()), dtype=cu_seq_k.dtype)
    return key.unsqueeze(1), value.unsqueeze(1), table, lens


@modules.remembered(torch.get_num_threads)
def _module(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, window: int | None
) -> Module:
    name = str(dtype).removeprefix("torch.")
    return modules.of(PagedAttentionSpec(num_heads, num_kv_heads, head_dim, block_size, name, window=window))
