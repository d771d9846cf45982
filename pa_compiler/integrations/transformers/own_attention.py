"""Models whose attention modules attend in their own forward, and ask transformers for no function: MPT, BLOOM (ALiBi).

Such a module gets a forward that projects and ends as its own does, and calls our attention between. How they project,
and what their blocks hand them, is private to transformers, for the versions in integrations/versions.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import dropout


def find(model: torch.nn.Module) -> list[Any]:
    """The attention modules of a model that attend in their own forward, in a way that is known here.

    Raises:
        ValueError: one asks for what the forward here has not.
    """
    found = [each for each in model.modules() if _name(each) in _FORWARDS]
    for layer in found:
        if getattr(layer, "slow_but_exact", False) and getattr(layer, "pretraining_tp", 1) > 1:
            raise ValueError(f"model: expected slow_but_exact=False, got a {type(layer).__name__} with True")
    return found


def use(layers: list[Any], attend: Callable[..., Any]) -> list[tuple[Any, Any]]:
    """Have attention modules call an attention function of transformers' kind. Returns what stop takes."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_FORWARDS[_name(layer)], layer, attend)
    return before


def stop(before: list[tuple[Any, Any]]) -> None:
    """Undo use."""
    for layer, forward in before:
        if forward is None:
            del layer.forward
        else:
            layer.forward = forward


def _name(layer: torch.nn.Module) -> tuple[str, str]:
    return type(layer).__module__, type(layer).__name__


def _mpt(
    layer: Any,
    attend: Callable[..., Any],
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor,
    cache: Any = None,
    attention_mask: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """MptAttention.forward. position_bias is [num_heads, 1, tokens]: slopes times the distance to the last token."""
    projected = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        projected = projected.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    heads = [each.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for each in projected.chunk(3, dim=2)]
    slopes = -position_bias[:, 0, -2]
    options = {"scaling": layer.softmax_scale, "dropout": layer.attn_dropout_p if layer.training else 0.0}
    return layer.out_proj(_attended(layer, attend, heads, cache, attention_mask, slopes, options)), None


def _bloom(
    layer: Any,
    attend: Callable[..., Any],
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """BloomAttention.forward. alibi is slopes times positions, rounded to the model's type: slopes are made anew."""
    heads = layer._reshape(layer.query_key_value(hidden_states))
    slopes = _bloom_slopes(layer.num_heads)
    options = {"scaling": layer.inv_norm_factor, "dropout": layer.attention_dropout.p if layer.training else 0.0}
    out = layer.dense(_attended(layer, attend, heads, layer_past, attention_mask, slopes, options))
    return residual + dropout(out, p=layer.hidden_dropout, training=layer.training), None


def _attended(
    layer: Any, attend: Callable[..., Any], heads: Any, cache: Any, mask: Any, slopes: torch.Tensor, options: Any
) -> torch.Tensor:
    """[batch, columns, num_heads * head_dim] of query, key and value [batch, num_heads, columns, head_dim]."""
    query, key, value = heads
    arguments: dict[str, Any] = {}
    if cache is not None:
        key, value = cache.update(key, value, layer.layer_idx, kwargs=arguments)
    out, _ = attend(layer, query, key, value, mask, alibi_slopes=slopes, **options, **arguments)
    return out.flatten(2)


@functools.cache
def _bloom_slopes(num_heads: int) -> torch.Tensor:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    return _get_alibi_slopes(num_heads, torch.device("cpu"))


_FORWARDS: dict[tuple[str, str], Callable[..., Any]] = {
    ("transformers.models.mpt.modeling_mpt", "MptAttention"): _mpt,
    ("transformers.models.bloom.modeling_bloom", "BloomAttention"): _bloom,
}
"""By module and name of a class, since a class of other people's that has such a name may differ."""
