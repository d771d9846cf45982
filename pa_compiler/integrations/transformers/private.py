"""What of transformers is private, or must be worked around, for the versions in integrations/versions.py.

It is all here but for the attention modules of MPT and BLOOM, which own_attention.py replaces.

- What a mask shows stands in a function of indices that transformers.masking_utils puts together: window_of takes it
  apart.
- generate() makes its cache in _prepare_cache_for_generation, which has no other hook.
- Continuous batching takes attentions whose name has "flash" in it, and no others of other people's. For such a name
  set_attn_implementation() would fetch a kernel, so what it sets is set here.
- Continuous batching gives block tables on GPUs alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import initialization
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pa_compiler.integrations import versions

NAME = "pa_compiler_flash"
"""Of our attention, in transformers' tables and in a model's config."""

_ensure_decode_fast_path = initialization.ensure_decode_fast_path_is_available
_CACHE_HOOK = "_prepare_cache_for_generation"


def check_version() -> None:
    """Check that transformers is of a version for which this file holds.

    Raises:
        RuntimeError: it is of another one.
    """
    versions.check("transformers", transformers.__version__, versions.TRANSFORMERS, "what this needs of it")


def register(attend: Callable[..., Any], make_mask: Callable[..., Any]) -> None:
    """Put our attention into transformers' tables, where any model may ask for it by name."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)
    initialization.ensure_decode_fast_path_is_available = _keep_block_tables


def unregister() -> None:
    """Undo register."""
    del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[NAME]
    initialization.ensure_decode_fast_path_is_available = _ensure_decode_fast_path


def use_attention(model: Any) -> list[tuple[Any, str]]:
    """Have all parts of a model ask for our attention. Returns what undoes it: configs, and what stood there."""
    parts = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in parts.values()]
    for config in parts.values():
        config._attn_implementation_internal = NAME  # and not by set_attn_implementation, which would fetch a kernel
    return before


def use_own_attention(before: list[tuple[Any, str]]) -> None:
    """Undo use_attention."""
    for config, name in before:
        config._attn_implementation_internal = name


def _keep_block_tables(config: Any, cb_config: Any, user_requested: bool) -> None:
    """ensure_decode_fast_path_is_available, by which a CPU gets block tables where all layers can have them."""
    kinds = initialization.group_layers_by_attn_type(config)
    tables = all(initialization.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in kinds)
    if config._attn_implementation != NAME or not tables:
        _ensure_decode_fast_path(config, cb_config, user_requested)


def window_of(mask_function: Any) -> int | None:
    """The window of a causal mask function, or None where it has none.

    Raises:
        ValueError: it is no causal one, with a sliding window or without.
    """
    if mask_function is causal_mask_function:
        return None
    name, parts = _taken_apart(mask_function)
    if name == "and_masks.<locals>.and_mask":
        overlay, *rest = parts["mask_functions"]
        name, values = _taken_apart(overlay)
        if rest == [causal_mask_function] and name == "sliding_window_overlay.<locals>.inner_mask":
            return int(values["sliding_window"])
    raise ValueError(f"attention_mask: expected a causal one, with a sliding window or without, got {name}")


def _taken_apart(function: Any) -> tuple[str, dict[str, Any]]:
    """The name of a function within transformers, and the values that it closes over."""
    cells = function.__closure__ or ()
    values = (each.cell_contents for each in cells)
    return function.__qualname__, dict(zip(function.__code__.co_freevars, values, strict=True))


def use_cache(model: Any, make: Callable[[int], Any]) -> None:
    """Have generate() of a model make its cache of the columns that it will need at most, where none is given."""
    original = getattr(type(model), _CACHE_HOOK)

    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model_kwargs.get("cache") is not None or generation_config.use_cache is False:
            return original(self, generation_config, model_kwargs, *args, **kwargs)
        if (asked := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: expected None, since pa_compiler has its own cache, got {asked!r}")
        columns = kwargs["max_cache_length"] if "max_cache_length" in kwargs else args[-1]
        model_kwargs["cache"] = make(columns)
        return None

    setattr(model, _CACHE_HOOK, types.MethodType(prepare, model))


def use_own_cache(model: Any) -> None:
    """Undo use_cache."""
    delattr(model, _CACHE_HOOK)
