"""What transformers calls in each layer: the function that makes a mask, and the one that attends."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from pa_compiler.integrations import modules
from pa_compiler.integrations.transformers import cache as caches
from pa_compiler.integrations.transformers import continuous
from pa_compiler.integrations.transformers.private import window_of
from pa_compiler.integrations.transformers.steps import Step, make_step
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec


class Mask:
    """What the layers of a kind get as attention_mask: what it would be made of, as the kernels need no mask.

    Attributes:
        padding: [batch, columns], bool: False for padding; or None.
        function: transformers' function of indices, which says what is seen.
        first_key, first_query: Columns from which keys and queries are counted.
        modules: Those that layers have asked for in this forward pass, by their shapes: most ask for the same.
    """

    def __init__(self, padding: torch.Tensor | None, function: Any, first_key: int, first_query: int) -> None:
        self.padding, self.function = padding, function
        self.first_key, self.first_query = first_key, first_query
        self.modules: dict[Any, Module] = {}

    def to(self, *_: Any) -> Mask:
        """Itself: MPT asks for its mask in another type."""
        return self


def make_mask(
    *, mask_function: Any, attention_mask: torch.Tensor | None, q_offset: int = 0, kv_offset: int = 0, **_: Any
) -> Mask:
    """A mask function of transformers'."""
    return Mask(attention_mask, mask_function, int(kv_offset), int(q_offset))


def attend(
    layer: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    paged_layer: caches.PagedLayer | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers': [batch, heads, columns, dim] to [batch, columns, num_heads, value_dim].

    Raises:
        ValueError: something is asked for that the kernels do not have. It is named.
    """
    _check(layer, dropout, others)
    heads = {"sinks": None if s_aux is None else s_aux.detach().float(), "alibi_slopes": alibi_slopes}
    has = (s_aux is not None, alibi_slopes is not None)
    shape = (query.shape[1], key.shape[1], key.shape[3], value.shape[3], query.dtype, softcap, *has)
    if attention_mask is None and continuous.is_continuous(others):
        find = functools.partial(_module, *shape, sliding_window)
        return continuous.attend_continuous(find, query, key, value, others, scaling, heads), None
    if not isinstance(attention_mask, Mask):
        got = list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else attention_mask
        raise ValueError(f"attention_mask: expected None or one of [batch, columns], got {got}")
    codes = caches.PLAIN if paged_layer is None else paged_layer.codes
    module = attention_mask.modules.get((shape, codes))
    if module is None:
        layouts = caches.layouts(query.dtype, key.shape[3])
        module = _module(*shape, window_of(attention_mask.function), caches.BLOCK_SIZE, layouts, codes)
        attention_mask.modules[shape, codes] = module
    if paged_layer is None:
        step, (keys, values) = _without_cache(module, query, key, value, attention_mask)
    else:
        step = paged_layer.append(module, key, value, attention_mask.padding)
        keys, values, heads = paged_layer.keys, paged_layer.values, heads | paged_layer.scales
    return _attend(module, query, keys, values, step, scaling, heads), None


def _check(layer: torch.nn.Module, dropout: float, others: dict[str, Any]) -> None:
    """Check what the kernels cannot take. Each is named."""
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}: call model.eval()")
    if not getattr(layer, "is_causal", True) or others.get("is_causal") is False:
        raise ValueError(f"is_causal: expected an attention that is causal, got {type(layer).__name__}")
    for name in ("position_bias", "output_attentions"):
        if others.get(name) is not None and others[name] is not False:
            raise ValueError(f"{name}: expected none, got one in {type(layer).__name__}")


@modules.remembered(torch.get_num_threads)
def _module(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    softcap: float | None,
    sinks: bool,
    alibi: bool,
    window: int | None,
    block_size: int,
    layouts: tuple[str, ...] = ("NHD",),
    codes: caches.Codes = caches.PLAIN,
) -> Module:
    shape, name = (num_heads, num_kv_heads, head_dim, block_size), str(dtype).removeprefix("torch.")
    fields: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks, "alibi": alibi}
    fields |= codes._asdict()
    first = PagedAttentionSpec(*shape, name, kv_layout=layouts[0], value_dim=value_dim, **fields)
    return modules.of(first, *(dataclasses.replace(first, kv_layout=layout) for layout in layouts[1:]))


def _without_cache(
    module: Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask
) -> tuple[Step, tuple[Any, Any]]:
    """The step of a call that has all keys at hand, which are put into blocks for it."""
    batch, _, total, _ = key.shape
    queries = query.shape[2]
    if mask.first_key + total != mask.first_query + queries:
        raise ValueError(
            f"cache: expected keys up to the last query token's at column {mask.first_query + queries - 1}, got "
            f"{total} from column {mask.first_key} on: static caches are not covered"
        )
    blocks = -(-total // caches.BLOCK_SIZE)
    padding = None if mask.padding is None else mask.padding[:, mask.first_key :]
    step = make_step(batch, blocks, caches.BLOCK_SIZE, total, total, queries, padding)
    pair = caches.empty_caches(module, batch * blocks)
    caches.append(module, key, value, *pair, step, {})
    return step, pair


def _attend(
    module: Module, query: torch.Tensor, keys: Any, values: Any, step: Step, scale: float | None, of_heads: Any
) -> torch.Tensor:
    """decode or attend of the query tokens, with what there is of each head. Padding gets 0."""
    batch, heads, columns, _ = query.shape
    if step.query_start_loc is None:
        tokens = query.squeeze(2)
        out = module.decode(tokens, keys, values, step.block_table, step.context_lens, scale, **of_heads)
        return out.unsqueeze(1)
    tokens = query.transpose(1, 2).flatten(0, 1)
    if step.rows is not None:
        tokens = tokens[step.rows]
    indices = (step.block_table, step.context_lens, step.query_start_loc)
    out = module.attend(tokens, keys, values, *indices, scale, **of_heads)
    if step.rows is not None:
        out = out.new_zeros(batch * columns, *out.shape[1:]).index_copy_(0, step.rows, out)
    return out.view(batch, columns, heads, -1)
