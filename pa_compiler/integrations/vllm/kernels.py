"""The kernels of a layer of vLLM, and their calls on vLLM's pages."""

from __future__ import annotations

from typing import Any

import torch

from pa_compiler.runtime.dense_calls import DenseCalls
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec


class Kernels:
    """The module of a layer, and what of the layer its calls take.

    Args:
        module: With attend.
        layer: vLLM's Attention, whose weights have been loaded.

    Attributes:
        module: The same.
    """

    def __init__(self, module: Module, layer: Any) -> None:
        self.module = module
        self._calls = DenseCalls(module, *_scales(module.spec, layer))
        self._scale: float = layer.impl.scale
        sinks = layer.impl.sinks
        self._of_heads = (layer.impl.alibi_slopes, None if sinks is None else sinks.detach().float())
        self._pages: torch.Tensor | None = None
        self._caches: tuple[torch.Tensor, torch.Tensor]

    def append(self, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the first tokens of key and value, as many as there are slots."""
        if len(slots) != len(key):
            key, value = key[: len(slots)], value[: len(slots)]
        self._calls.append_kv(key, value, *self._split(pages), slots)

    def attend(self, query: torch.Tensor, pages: torch.Tensor, metadata: Any, out: torch.Tensor) -> None:
        """Attend from the tokens of a step, by vLLM's CPUAttentionMetadata.

        query and out are [tokens, num_heads, head_dim], and may have room for more tokens than there are.
        """
        tokens, lens, causal = metadata.num_actual_tokens, metadata.seq_lens, metadata.causal
        if tokens != len(query):
            query, out = query[:tokens], out[:tokens]
        arrays = (query, *self._split(pages), metadata.block_table, lens)
        if metadata.max_query_len == 1 and tokens == len(lens) and causal:
            self._calls.decode(*arrays, self._scale, out, *self._of_heads)
        else:
            self._calls.attend(*arrays, metadata.query_start_loc, self._scale, out, causal, *self._of_heads)

    def _split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value caches in pages, which are the same tensor in every step."""
        if pages is not self._pages:
            self._pages, self._caches = pages, split(self.module.spec, pages)
        return self._caches


def _scales(spec: PagedAttentionSpec, layer: Any) -> tuple[torch.Tensor, ...]:
    """key_scale and value_scale of one of vLLM's Attention layers, views of its buffers; none without a kv_dtype."""
    return (layer._k_scale.detach().view(-1), layer._v_scale.detach().view(-1)) if spec.has_scales else ()


def split(spec: PagedAttentionSpec, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of pages [blocks, num_kv_heads, block_size, 2 * head_dim] as key and value caches of a spec.

    Keys of a head lie in the first half of what a page has for it, values in the second, whatever their layout. vLLM
    gives codes as bytes.
    """
    blocks, heads = pages.shape[:2]
    halves = pages.view(getattr(torch, spec.cache_dtype)).view(blocks, heads, 2, -1)
    keys, values = (
        halves[:, :, half].view(blocks, *shape[1:])
        for half, shape in enumerate((spec.key_cache_shape, spec.value_cache_shape))
    )
    return keys, values
