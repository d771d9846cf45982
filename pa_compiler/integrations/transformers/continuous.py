"""Attention of generate_batch, transformers' continuous batching, on its own pages and on keys that it has gathered.

Its sequences lie behind each other in one row of tokens. Where each has one query token, and its layers all have pages,
a call gets the pages and a table: the new keys go into them, and decode reads them where they are. In any other call
transformers hands over all keys and values of the sequences, copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pa_compiler.integrations.torch.varlen import as_blocks
from pa_compiler.runtime.module import Module


def is_continuous(arguments: Mapping[str, Any]) -> bool:
    """Whether an attention's arguments are those of continuous batching."""
    return arguments.get("cu_seq_lens_q") is not None and arguments.get("cu_seq_lens_k") is not None


def attend_continuous(
    module_for: Callable[[int], Module],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: Mapping[str, Any],
    scale: float | None,
    of_heads: Mapping[str, Any],
) -> torch.Tensor:
    """The attention of [1, heads, tokens, head_dim], [1, tokens, num_heads, value_dim].

    Args:
        module_for: The module for a block_size.
        query: Of all sequences.
        key: New ones where arguments have a table, and otherwise all that the sequences see.
        value: Likewise.
        arguments: What transformers calls an attention with.
        scale: Of the module.
        of_heads: sinks and alibi_slopes of the module.

    Raises:
        ValueError: there is a table, and a sequence has not one query token.
    """
    tokens = query[0].transpose(0, 1)
    new = key[0].transpose(0, 1), value[0].transpose(0, 1)
    table, cu_seq_lens_k = arguments.get("block_table"), arguments["cu_seq_lens_k"]
    if table is None:
        call = (*as_blocks(*new, cu_seq_lens_k, None), arguments["cu_seq_lens_q"])
        return module_for(1).attend(tokens, *call, scale, **of_heads)[None]
    if len(tokens) != len(table):
        raise ValueError(f"block_table: expected {len(tokens)} rows, as there are query tokens, got {len(table)}")
    pages = arguments["k_cache"], arguments["v_cache"]
    lens, page_size = cu_seq_lens_k.diff(), pages[0].shape[1]
    last = (lens - 1).clamp(min=0).long()
    blocks = table.gather(1, (last // page_size)[:, None])[:, 0].long()
    slots = torch.where(lens > 0, blocks * page_size + last % page_size, -1)
    module = module_for(page_size)
    module.append_kv(*new, *pages, slots)
    return module.decode(tokens, *pages, table, lens, scale, **of_heads)[None]
