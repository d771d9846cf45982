"""The attention backend that vLLM gets in place of its own, whose subclass it is: what is not overridden is vLLM's.

vLLM allocates the pages, says which belong to whom, and calls a layer twice in a step: to write its new keys and
values, and to attend. Pages are of a layer, and whoever attends in a layer lays them out: the kernels, or vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from pa_compiler.integrations.vllm.kernels import Kernels
from pa_compiler.integrations.vllm.layers import choose_kernels


class PagedBackend(CPUAttentionBackend):
    """vLLM's backend for CPUs, with layers on these kernels. Its name stays, since the platform asks for no other."""

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        """The class of what attends in a layer."""
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedBuilder]:
        """The class of what is made for a group of layers when their pages have been allocated."""
        return PagedBuilder


class PagedBuilder(CPUAttentionMetadataBuilder):
    """Chooses the kernels of a group of layers, before the first request, and describes each step to them.

    The size of a page is known only here, and so what is to be compiled.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        layers = {name: layer for name, layer in layers.items() if isinstance(layer.impl, PagedImpl)}
        diffusion = vllm_config.diffusion_config is not None
        chosen = choose_kernels(layers, kv_cache_spec.block_size, vllm_config.model_config.dtype, diffusion)
        for name, layer in layers.items():
            layer.impl.kernels = chosen[name]
        self._all_chosen = len(layers) == len(layer_names) and None not in chosen.values()
        try:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        except NotImplementedError:  # vLLM's kernel has not such pages on this CPU, as of float8 without AVX-512
            if not self._all_chosen:
                raise

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """A step's CPUAttentionMetadata; without the schedule of vLLM's kernel where no layer asks for it."""
        common = common_attn_metadata
        if not self._all_chosen:
            return super().build(common_prefix_len, common, fast_build)
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=common.causal,
        )


class PagedImpl(CPUAttentionBackendImpl):
    """What attends in one layer.

    Attributes:
        kernels: Those of the layer, or None where vLLM's own attends; and before its builder has been made.
    """

    kernels: Kernels | None = None

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values [tokens, num_kv_heads, head_size] into pages."""
        if self.kernels is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        self.kernels.append(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend: query and output are [tokens, num_heads, head_size], and pages have the new keys and values.

        Without attn_metadata, when vLLM warms up, output is left as it is.

        Raises:
            NotImplementedError: output is to be quantised.
        """
        if attn_metadata is None or self.kernels is None:
            arguments = (layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
            return super().forward(*arguments)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: expected None, as pa_compiler does not quantise out, got a tensor")
        self.kernels.attend(query, kv_cache, attn_metadata, output)
        return output
