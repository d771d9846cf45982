"""The calls of a module as operators of torch, which torch.compile and torch.export take into their graphs.

An operator takes tensors, numbers and strings, so it is told by a string which module it is to call: the module's
handle, by default the SHA-256 of its library. A graph that was kept on disk, or exported, has that string in it, and
runs in any process that has made Operators of the same library. torch.library's custom_op would put 30 us of Python
around each call; these are defined by their schemas, and 3 to 5 us beside the module's own call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pa_compiler.integrations.torch import definitions
from pa_compiler.runtime.arguments import input_arrays, real_number
from pa_compiler.runtime.module import Module


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
        definitions.MODULES[self.handle] = module

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
                return definitions.DECODE(self.handle, *arrays, _number(scale), return_lse=True, **options)
            return definitions.DECODE(self.handle, *arrays, _number(scale), **options)[0]
        out, lse = self._written(query, 0, out, lse, return_lse)
        definitions.DECODE_OUT(self.handle, *arrays, out, lse, _number(scale), **options)
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
                return definitions.ATTEND(self.handle, *arrays, _number(scale), return_lse=True, **options)
            return definitions.ATTEND(self.handle, *arrays, _number(scale), **options)[0]
        out, lse = self._written(query, 0, out, lse, return_lse)
        definitions.ATTEND_OUT(self.handle, *arrays, out, lse, _number(scale), **options)
        return out if lse is None else (out, lse)

    def merge_states(
        self,
        outs: torch.Tensor,
        lses: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Module.merge_states of tensors."""
        if out is None and lse is None:
            found = definitions.MERGE_STATES(self.handle, outs, lses, return_lse=return_lse)
            return found if return_lse else found[0]
        out, lse = self._written(outs, 1, out, lse, return_lse)
        definitions.MERGE_STATES_OUT(self.handle, outs, lses, out, lse)
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
        definitions.APPEND_KV(self.handle, key, value, key_cache, value_cache, slot_mapping, check=check)

    def _listed(self, inputs: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor] | None:
        """The arrays of inputs as the operators take them."""
        return None if inputs is None else list(input_arrays(self.module.spec, inputs))

    def _written(
        self, like: torch.Tensor, axis: int, out: torch.Tensor | None, lse: torch.Tensor | None, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is written of a call: new where it is not given, of as many tokens as a tensor has along an axis."""
        spec, new = self.module.spec, definitions.new_tensor
        tokens = like.shape[axis] if like.dim() > axis else 0  # the module refuses it
        if out is None:
            out = new(like, tokens, spec.result_dtype, spec.num_heads, spec.result_dim)
        if lse is None and return_lse:
            lse = new(like, tokens, "float32", spec.num_heads)
        return out, lse


def _options(alibi_slopes: Any, sinks: Any, inputs: Any, check: Any) -> dict[str, Any]:
    """Those that are given: an operator takes half a microsecond for each, None or not."""
    if alibi_slopes is None and sinks is None and inputs is None and check is None:
        return {}
    return {"alibi_slopes": alibi_slopes, "sinks": sinks, "inputs": inputs, "check": check}


def _number(scale: Any) -> float | None:
    return None if scale is None else real_number("scale", scale)
