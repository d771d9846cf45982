"""The operators of torch.ops.pa_compiler: what each takes and returns, what it calls, and what torch's tracing sees.

An operator returns tensors of its own or writes into those that it is given, never either. So a call of a module is two
of them, the second with _out in its name. The first returns as many tensors each time: lse is empty where none is asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

_LIBRARY = torch.library.Library("pa_compiler", "DEF")

MODULES: dict[str, Module] = {}
"""By handle: what the operators call."""


def new_tensor(like: Any, tokens: Any, dtype: str, *extents: int) -> torch.Tensor:
    """[tokens, *extents] of a dtype, on the device of a tensor."""
    return like.new_empty((tokens, *extents), dtype=getattr(torch, dtype))


def _module(handle: str) -> Module:
    try:
        return MODULES[handle]
    except KeyError:
        raise ValueError(
            f"module: expected the handle of a module of which pa_compiler.integrations.torch.Operators were made in "
            f"this process, got {handle!r}"
        ) from None


def _by_name(module: Module, inputs: Sequence[torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """The arrays that an operator is given in the order of the spec's inputs."""
    if inputs is None:
        return None
    names = [each.name for each in module.spec.inputs]
    if len(names) != len(inputs):
        raise TypeError(f"inputs: expected {len(names)} tensors, got {len(inputs)}")
    return dict(zip(names, inputs, strict=True))


def _decode(handle: str, *arrays: Any, return_lse: bool = False, inputs: Any = None, **options: Any) -> Any:
    module = _module(handle)
    found = module.decode(*arrays, return_lse=return_lse, inputs=_by_name(module, inputs), **options)
    return found if return_lse else (found, _no_lse(found))


def _attend(handle: str, *arrays: Any, return_lse: bool = False, inputs: Any = None, **options: Any) -> Any:
    module = _module(handle)
    found = module.attend(*arrays, return_lse=return_lse, inputs=_by_name(module, inputs), **options)
    return found if return_lse else (found, _no_lse(found))


def _decode_out(
    handle: str, query: Any, key_cache: Any, value_cache: Any, block_table: Any, context_lens: Any, out: Any,
    lse: Any = None, scale: float | None = None, *, inputs: Any = None, **options: Any,
) -> None:  # fmt: skip
    module, arrays = _module(handle), (query, key_cache, value_cache, block_table, context_lens)
    module.decode(*arrays, scale, out, lse=lse, inputs=_by_name(module, inputs), **options)
    _count_writes(out, lse)


def _attend_out(
    handle: str, query: Any, key_cache: Any, value_cache: Any, block_table: Any, context_lens: Any,
    query_start_loc: Any, out: Any, lse: Any = None, scale: float | None = None, *, inputs: Any = None, **options: Any,
) -> None:  # fmt: skip
    module, arrays = _module(handle), (query, key_cache, value_cache, block_table, context_lens, query_start_loc)
    module.attend(*arrays, scale, out, lse=lse, inputs=_by_name(module, inputs), **options)
    _count_writes(out, lse)


def _merge_states(handle: str, outs: Any, lses: Any, *, return_lse: bool = False) -> Any:
    found = _module(handle).merge_states(outs, lses, return_lse=return_lse)
    return found if return_lse else (found, _no_lse(found))


def _merge_states_out(handle: str, outs: Any, lses: Any, out: Any, lse: Any = None) -> None:
    _module(handle).merge_states(outs, lses, out, lse)
    _count_writes(out, lse)


def _append_kv(
    handle: str, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, *, check: str | None = None
) -> None:
    _module(handle).append_kv(key, value, key_cache, value_cache, slot_mapping, check=check)
    _count_writes(key_cache, value_cache)


def _count_writes(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that tensors have other contents, as every operator of torch that writes does."""
    torch.autograd.graph.increment_version([each for each in tensors if each is not None])


def _no_lse(out: torch.Tensor) -> torch.Tensor:
    """What stands for lse where none is asked for, since an operator returns as many tensors each time."""
    return out.new_empty(0, dtype=torch.float32)


def _new_fake(handle: str, query: torch.Tensor, *arrays: Any, return_lse: bool = False, **options: Any) -> Any:
    """Tensors of the shapes and types that decode and attend return, for torch's tracing."""
    spec = _module(handle).spec
    if query.dim() != 3:
        raise ValueError(f"query: expected 3 axes, got {query.dim()}")
    return _traced_results(spec, query, query.shape[0], return_lse)


def _merged_fake(handle: str, outs: torch.Tensor, lses: torch.Tensor, *, return_lse: bool = False) -> Any:
    """The same of merge_states."""
    spec = _module(handle).spec
    if outs.dim() != 4:
        raise ValueError(f"outs: expected 4 axes, got {outs.dim()}")
    return _traced_results(spec, outs, outs.shape[1], return_lse)


def _traced_results(spec: PagedAttentionSpec, like: torch.Tensor, tokens: Any, return_lse: bool) -> Any:
    """out and lse of so many query tokens."""
    lse = new_tensor(like, tokens, "float32", spec.num_heads) if return_lse else _no_lse(like)
    return new_tensor(like, tokens, spec.result_dtype, spec.num_heads, spec.result_dim), lse


def _no_fake(handle: str, *arrays: Any, **options: Any) -> None:
    """What writes returns nothing, and its tensors have their shapes."""
    _module(handle)


def _check_traced(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check of tensors without memory what the module cannot when it runs: torch leaves it to each operator.

    Raises:
        ValueError: one is to have a gradient, or is on another device than the first.
    """
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on device {device}, got one on {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, got one with requires_grad: call detach(), or this "
                "function under torch.no_grad()"
            )


def _define(schema: str, kernel: Any, fake: Any) -> Any:
    """Define an operator, whose tensors keep their strides in compiled graphs. The module checks their device."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    operator = getattr(torch.ops.pa_compiler, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def checked(*arrays: Any, **options: Any) -> Any:
        tensors = {each: array for each, array in zip(names, arrays, strict=False) if isinstance(array, torch.Tensor)}
        _check_traced(tensors)
        return fake(*arrays, **options)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pa_compiler::{name}", checked, lib=_LIBRARY)
    return operator


_CACHES = "Tensor query, Tensor key_cache, Tensor? value_cache, Tensor block_table, Tensor context_lens"
_WRITTEN = "Tensor(a!) out, Tensor(b!)? lse=None"
_DECODE_OPTIONS = "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor[]? inputs=None, str? check=None"
_ATTEND_OPTIONS = f"bool causal=True, Tensor? tree_mask=None, {_DECODE_OPTIONS}"

DECODE = _define(
    f"decode(str module, {_CACHES}, float? scale=None, *, bool return_lse=False, {_DECODE_OPTIONS}) -> "
    "(Tensor, Tensor)",
    *(_decode, _new_fake),
)
DECODE_OUT = _define(
    f"decode_out(str module, {_CACHES}, {_WRITTEN}, float? scale=None, *, {_DECODE_OPTIONS}) -> ()",
    *(_decode_out, _no_fake),
)
ATTEND = _define(
    f"attend(str module, {_CACHES}, Tensor query_start_loc, float? scale=None, *, bool return_lse=False, "
    f"{_ATTEND_OPTIONS}) -> (Tensor, Tensor)",
    *(_attend, _new_fake),
)
ATTEND_OUT = _define(
    f"attend_out(str module, {_CACHES}, Tensor query_start_loc, {_WRITTEN}, float? scale=None, *, {_ATTEND_OPTIONS}) "
    "-> ()",
    *(_attend_out, _no_fake),
)
MERGE_STATES = _define(
    "merge_states(str module, Tensor outs, Tensor lses, *, bool return_lse=False) -> (Tensor, Tensor)",
    *(_merge_states, _merged_fake),
)
MERGE_STATES_OUT = _define(
    f"merge_states_out(str module, Tensor outs, Tensor lses, {_WRITTEN}) -> ()",
    *(_merge_states_out, _no_fake),
)
APPEND_KV = _define(
    "append_kv(str module, Tensor key, Tensor? value, Tensor(a!) key_cache, Tensor(b!)? value_cache, "
    "Tensor slot_mapping, *, str? check=None) -> ()",
    *(_append_kv, _no_fake),
)
