"""enable() and disable(): a model of transformers on these kernels, and as it was."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from pa_compiler.integrations import modules
from pa_compiler.integrations.transformers import own_attention, private
from pa_compiler.integrations.transformers.attention import attend, make_mask
from pa_compiler.integrations.transformers.cache import Codes, PagedCache
from pa_compiler.runtime.module import Module
from pa_compiler.spec import DTYPES

_before: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""What each enabled model had, as private.use_own_attention and own_attention.stop take it."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def enable(
    model: PreTrainedModel,
    *modules_to_use: Module,
    kv_dtype: str | None = None,
    kv_scale: str | None = None,
    kv_rotation: str | None = None,
) -> None:
    """Put a model's attention on these kernels: prefill, chunks of it, and decode.

    After it generate() needs nothing else, and makes a PagedCache for itself; calls of the model without a cache, and
    with a DynamicCache, run on the kernels too. Each layer gets the module that its call asks for (heads, head_dim,
    window, soft cap, sinks, ALiBi), compiled when it is first met. RoPE stays the model's. There is no gradient.

    Args:
        model: One whose attention is causal.
        *modules_to_use: Modules with attend to take for their specs from now on, for all models: so nothing is compiled
            for these, or they are for another target. Their blocks have 32 tokens, packed for bfloat16 or NHD, and
            generate_batch's, NHD, as many as its pages.
        kv_dtype: What the caches of generate() hold in place of the model's type: codes, as PagedAttentionSpec has it.
            Each of float8 counts as it is, with a scale of 1. Calls without a cache, and generate_batch, keep the type.
        kv_scale: Likewise.
        kv_rotation: Likewise.

    Raises:
        RuntimeError: transformers is of a version that is not known.
        TypeError: model is none of transformers', or one of modules_to_use is no Module.
        ValueError: one of modules_to_use has no attend, or the model is enabled already, or is one that is not covered.
            What it has is named, and nothing of it has been changed.
    """
    private.check_version()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    if model in _before:
        raise ValueError(f"model: expected one that is not enabled, got an enabled {type(model).__name__}")
    _check(model)
    modules.keep(*modules_to_use)
    config = model.config.get_text_config(decoder=True)
    private.register(attend, make_mask)
    _before[model] = private.use_attention(model), own_attention.use(own_attention.find(model), attend)
    codes = Codes(kv_dtype, kv_scale, kv_rotation)
    private.use_cache(model, lambda columns: PagedCache(config.num_hidden_layers, columns, codes))


def disable(model: PreTrainedModel) -> None:
    """Put a model back to the attention and the caches that it had.

    Raises:
        ValueError: it is not enabled.
    """
    if model not in _before:
        raise ValueError(f"model: expected one that enable() was called with, got {type(model).__name__}")
    private.use_own_cache(model)
    names, forwards = _before.pop(model)
    private.use_own_attention(names)
    own_attention.stop(forwards)
    if not _before:
        private.unregister()


def _check(model: Any) -> None:
    """Check that the kernels have what a model asks for.

    Raises:
        ValueError: they have not.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if not own_attention.find(model) and not model._can_set_attn_implementation():
        raise ValueError(f"model: expected one that calls transformers' AttentionInterface, got {name}, which does not")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: expected a decoder, got {name}, an encoder and a decoder")
    for path, layer in model.named_modules():
        if getattr(layer, "is_causal", True) is False:
            raise ValueError(f"model: expected attention that is causal, got {name} with {path}, which is not")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"model: expected attention that is causal, got {name} with is_causal=False in its config")
    if others := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        raise ValueError(f"model: expected layers of full and sliding attention, got {name} with {sorted(others)}")
    for path, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if parameter.device != torch.device("cpu"):
            raise ValueError(f"model: expected parameters on the CPU, got {path} on {parameter.device}")
        if parameter.is_floating_point() and dtype not in DTYPES:
            raise ValueError(f"model: expected parameters of {', '.join(DTYPES)}, got {path} of {dtype}")
