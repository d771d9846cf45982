"""decode, attend and append_kv as operators of torch, which torch.compile and torch.export take into their graphs.

An operator takes tensors, numbers and strings, so it is told by a string which module it is to call: the module's
handle, by default the SHA-256 of its library. A graph that was kept on disk, or exported, has that string in it, and
runs in any process that has made Operators of the same library. torch.library's custom_op would put 30 us of Python
around each call; these are defined by their schemas, and 3 to 5 us beside the module's own call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pa_compiler.runtime.arguments import input_arrays, real_number
from pa_compiler.runtime.module import Module

_LIBRARY = torch.library.Library("pa_compiler", "DEF")
_MODULES: dict[str, Module] = {}
"""By handle: what the operators call."""


class Operators:
    """The calls of a module as operators of torch: the same arguments, results and errors, and no break in a graph.

    They can be pickled and copied as the module can, and have the same handle in every process. The module that was
    given last for a handle is the one that is called. Two modules of one library with other settings need other names.

    Args:
        module: Of a CPU or a GPU. It stays in memory for the rest of the process.
        name: A handle in place of the library's SHA-256.

    Attributes:
        module: The module.
        handle: The first argument of torch.ops.pa_compiler.decode and the others.
    """

    def __init__(self, module: Module, name: str | None = None) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"module: expected a Module, got {type(module).__name__}")
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"name: expected a string that is not empty, or None, got {name!r}")
        self.module, self._name = module, name
        self.handle = name or module.checksum
        _MODULES[self.handle] = module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self._name)

    def decode(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor | None,
        block_table: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float | None = None,
        out: torch.Tensor | None = None,
        *,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
        check: str | None = None,
    ) -> Any:
        """Module.decode of tensors."""
        arrays = (query, key_cache, value_cache, block_table, context_lens)
        options = _options(alibi_slopes, sinks, self._listed(inputs), check)
        if out is None and lse is None:
            if return_lse:
                return _DECODE(self.handle, *arrays, _number(scale), return_lse=True, **options)
            return _DECODE(self.handle, *arrays, _number(scale), **options)[0]
        out, lse = self._written(query, out, lse, return_lse)
        _DECODE_OUT(self.handle, *arrays, out, lse, _number(scale), **options)
        return out if lse is None else (out, lse)

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor | None,
        block_table: torch.Tensor,
        context_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float | None = None,
        out: torch.Tensor | None = None,
        *,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        causal: bool = True,
        tree_mask: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
        check: str | None = None,
    ) -> Any:
        """Module.attend of tensors."""
        arrays = (query, key_cache, value_cache, block_table, context_lens, query_start_loc)
        options = _options(alibi_slopes, sinks, self._listed(inputs), check)
        if not causal or tree_mask is not None:
            options |= {"causal": causal, "tree_mask": tree_mask}
        if out is None and lse is None:
            if return_lse:
                return _ATTEND(self.handle, *arrays, _number(scale), return_lse=True, **options)
            return _ATTEND(self.handle, *arrays, _number(scale), **options)[0]
        out, lse = self._written(query, out, lse, return_lse)
        _ATTEND_OUT(self.handle, *arrays, out, lse, _number(scale), **options)
        return out if lse is None else (out, lse)

    def append_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor | None,
        slot_mapping: torch.Tensor,
        *,
        check: str | None = None,
    ) -> None:
        """Module.append_kv of tensors."""
        _APPEND(self.handle, key, value, key_cache, value_cache, slot_mapping, check=check)

    def _listed(self, inputs: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor] | None:
        """The arrays of inputs as the operators take them."""
        return None if inputs is None else list(input_arrays(self.module.spec, inputs))

    def _written(
        self, query: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is written of a call: new where it is not given."""
        spec = self.module.spec
        if out is None:
            out = _new(query, spec.result_dtype, spec.num_heads, spec.result_dim)
        if lse is None and return_lse:
            lse = _new(query, "float32", spec.num_heads)
        return out, lse


def _options(alibi_slopes: Any, sinks: Any, inputs: Any, check: Any) -> dict[str, Any]:
    """Those that are given: an operator takes half a microsecond for each, None or not."""
    if alibi_slopes is None and sinks is None and inputs is None and check is None:
        return {}
    return {"alibi_slopes": alibi_slopes, "sinks": sinks, "inputs": inputs, "check": check}


def _number(scale: Any) -> float | None:
    return None if scale is None else real_number("scale", scale)


def _new(query: Any, dtype: str, *extents: int) -> torch.Tensor:
    return query.new_empty((query.shape[0], *extents), dtype=getattr(torch, dtype))


def _module(handle: str) -> Module:
    try:
        return _MODULES[handle]
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
    lse = _new(query, "float32", spec.num_heads) if return_lse else _no_lse(query)
    return _new(query, spec.result_dtype, spec.num_heads, spec.result_dim), lse


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

_DECODE = _define(
    f"decode(str module, {_CACHES}, float? scale=None, *, bool return_lse=False, {_DECODE_OPTIONS}) -> "
    "(Tensor, Tensor)",
    *(_decode, _new_fake),
)
_DECODE_OUT = _define(
    f"decode_out(str module, {_CACHES}, {_WRITTEN}, float? scale=None, *, {_DECODE_OPTIONS}) -> ()",
    *(_decode_out, _no_fake),
)
_ATTEND = _define(
    f"attend(str module, {_CACHES}, Tensor query_start_loc, float? scale=None, *, bool return_lse=False, "
    f"{_ATTEND_OPTIONS}) -> (Tensor, Tensor)",
    *(_attend, _new_fake),
)
_ATTEND_OUT = _define(
    f"attend_out(str module, {_CACHES}, Tensor query_start_loc, {_WRITTEN}, float? scale=None, *, {_ATTEND_OPTIONS}) "
    "-> ()",
    *(_attend_out, _no_fake),
)
_APPEND = _define(
    "append_kv(str module, Tensor key, Tensor? value, Tensor(a!) key_cache, Tensor(b!)? value_cache, "
    "Tensor slot_mapping, *, str? check=None) -> ()",
    *(_append_kv, _no_fake),
)
