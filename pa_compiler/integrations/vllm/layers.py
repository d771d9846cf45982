"""Which of vLLM's layers the kernels attend in, by which module, and why not in the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType

from pa_compiler.integrations.vllm import libraries
from pa_compiler.integrations.vllm.kernels import Kernels
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

logger = init_logger("vllm.pa_compiler")  # what is logged below vLLM's own name is shown


DIFFUSION = "diffusion_config, a model that generates by diffusion, where expected is attention that is causal"

FLOAT8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""kv_dtype by vLLM's kv_cache_dtype: what pages may hold in place of the model's type, on a CPU."""


def choose_kernels(
    layers: Mapping[str, Any], block_size: int, dtype: torch.dtype, diffusion: bool = False
) -> dict[str, Kernels | None]:
    """The kernels of each of vLLM's Attention layers, or None where vLLM's own are to attend.

    Modules are loaded or compiled for it. The log says which layers have which, and why others have none.

    Args:
        layers: By name. Weights have been loaded.
        block_size: Tokens of a page.
        dtype: Of queries, keys and values.
        diffusion: Whether the model generates by diffusion, where sequences of one step differ in causality.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as libraries.module_of, about PA_MODULES.
        NotImplementedError: pages are of a type that neither these kernels nor vLLM's have on a CPU.
    """
    found: dict[str, Module | str] = {}
    for name, layer in layers.items():
        found[name] = DIFFUSION if diffusion else _module_or_reason(layer, block_size, dtype)
    for names in _sharing(layers):  # they must agree on what is in their pages
        if reason := next((each for name in names if isinstance(each := found[name], str)), None):
            found.update(dict.fromkeys(names, reason))
    _log(found)
    return {name: None if isinstance(each, str) else Kernels(each, layers[name]) for name, each in found.items()}


def _sharing(layers: Mapping[str, Any]) -> Iterable[list[str]]:
    """The layers of each set of pages."""
    found: dict[str, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(layer.kv_sharing_target_layer_name or name, []).append(name)
    return found.values()


def _module_or_reason(layer: Any, block_size: int, dtype: torch.dtype) -> Module | str:
    spec = spec_of(layer, block_size, dtype)
    return spec if isinstance(spec, str) else libraries.module_of(spec)


def spec_of(layer: Any, block_size: int, dtype: torch.dtype) -> PagedAttentionSpec | str:
    """The spec of one of vLLM's Attention layers, or what it needs that the kernels have not.

    Raises:
        NotImplementedError: its pages are of a type that vLLM's kernel has not either, and would write beyond.
    """
    impl, kv_dtype = layer.impl, FLOAT8.get(layer.kv_cache_dtype)
    if kv_dtype is None and layer.kv_cache_torch_dtype != dtype:
        known = f"auto, for the model's {dtype}, or one of {', '.join(FLOAT8)}"
        raise NotImplementedError(f"kv_cache_dtype: expected {known}, on a CPU, got {layer.kv_cache_dtype!r}")
    if impl.attn_type != AttentionType.DECODER:
        return f"attn_type {AttentionType(impl.attn_type).value!r}, where expected is 'decoder'"
    if layer.head_size_v != layer.head_size:
        return f"head_size_v {layer.head_size_v}, where expected is head_size, {layer.head_size}"
    if layer.use_mm_prefix:
        return "use_mm_prefix, images whose tokens see each other, where expected is attention that is causal"
    name = str(dtype).removeprefix("torch.")
    transposed = block_size % 16 == 0 and (layer.head_size % 2 == 0 or (kv_dtype or name) != "bfloat16")
    fields: dict[str, Any] = {
        "window": None if impl.sliding_window == -1 else impl.sliding_window,
        "softcap": impl.logits_soft_cap or None,
        "alibi": impl.alibi_slopes is not None,
        "sinks": impl.sinks is not None,
        "kv_layout": "packed" if transposed else "HND",
        "kv_dtype": kv_dtype,
        "kv_scale": None if kv_dtype is None else "tensor" if layer._k_scale.numel() == 1 else "head",
    }
    try:
        return PagedAttentionSpec(layer.num_heads, layer.num_kv_heads, layer.head_size, block_size, name, **fields)
    except (TypeError, ValueError) as error:
        return str(error)


def _log(found: Mapping[str, Module | str]) -> None:
    """Say which layers have which kernels, and which have none."""
    groups: dict[Module | str, list[str]] = {}
    for name, each in found.items():
        groups.setdefault(each, []).append(name)
    for each, names in groups.items():
        count, which = len(names), listed(names)
        if isinstance(each, str):
            logger.warning("pa_compiler leaves %d layers to vLLM's kernel: %s: %s", count, which, each)
        else:
            threads, spec = each.num_threads, each.spec
            logger.info("pa_compiler attends in %d layers on %d threads: %s: %s", count, threads, which, spec)


def listed(names: Iterable[str]) -> str:
    """Names of layers, where those that differ in their first number are one: model.layers.0-4,6.attn."""
    numbers: dict[tuple[str, str], list[int]] = {}
    others = []
    for name in names:
        if found := re.fullmatch(r"(\D*)(\d+)(.*)", name):
            numbers.setdefault((found[1], found[3]), []).append(int(found[2]))
        else:
            others.append(name)
    return ", ".join([*(f"{before}{_ranges(each)}{after}" for (before, after), each in numbers.items()), *others])


def _ranges(numbers: list[int]) -> str:
    """0-4,6 of 0, 1, 2, 3, 4 and 6."""
    ends: list[list[int]] = []
    for number in sorted(numbers):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ends)
