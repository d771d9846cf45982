"""These kernels in TVM's Relax: the functions that vm.builtin.paged_attention_kv_cache_create takes, from a spec."""

from __future__ import annotations

from pa_compiler.integrations.relax.functions import KVCacheFunctions, kv_cache_functions

__all__ = ["KVCacheFunctions", "kv_cache_functions"]
