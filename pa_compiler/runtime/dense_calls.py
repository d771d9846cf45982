"""The calls of a module for engines, which make them for each layer of each step on tensors that they know."""

from __future__ import annotations

from typing import Any

from pa_compiler.runtime.module import Module


class DenseCalls:
    """decode, attend and append_kv of a module for a CPU, on tensors that are handed to the library as they are.

    All arrays are torch's dense tensors on the CPU, neither negated views nor ones that need a gradient, which is not
    looked at: in a model, where the code of a call is in no cache of the CPU, that takes 7 to 11 us of each. Shapes,
    types, strides, indices and overlaps are checked by the library, as ever, before anything is written.

    Args:
        module: With attend, of a spec whose functions take no inputs.
        key_scale: Of the caches that calls are given, as Module.decode takes it; None without a kv_dtype.
        value_scale: Likewise.

    Raises:
        ValueError: the module is another.
    """

    def __init__(self, module: Module, key_scale: Any = None, value_scale: Any = None) -> None:
        if module.spec.inputs or not module.has_attend:
            raise ValueError(f"module: expected one with attend, without inputs, got {module}")
        self._module = module
        self._scales = (key_scale, value_scale)
        self._absent_table = (None, None)  # a pair in place of a block table

    def append_kv(self, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any) -> None:
        """As Module.append_kv.

        Raises:
            As it, for what the library checks.
        """
        module = self._module
        module._append_kv.call_dense(
            (key, value, key_cache, value_cache, slot_mapping, *self._scales), module._thread_numbers
        )

    def decode(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        scale: float,
        out: Any,
        alibi_slopes: Any = None,
        sinks: Any = None,
    ) -> None:
        """As Module.decode, into out and without lse.

        Raises:
            As it, for what the library checks.
        """
        module = self._module
        tables = (block_table, *self._absent_table)
        arrays = (query, key_cache, value_cache, *tables, context_lens, out, None, alibi_slopes, sinks, *self._scales)
        module._decode.call_dense(arrays, (scale, *module._thread_numbers))

    def attend(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        query_start_loc: Any,
        scale: float,
        out: Any,
        causal: bool,
        alibi_slopes: Any = None,
        sinks: Any = None,
    ) -> None:
        """As Module.attend, into out, without lse and without a tree.

        Raises:
            As it, for what the library checks.
        """
        module, attend = self._module, self._module._attend
        assert attend is not None  # as __init__ has seen
        tables = (block_table, *self._absent_table)
        arrays = (query, key_cache, value_cache, *tables, context_lens, query_start_loc, out, None)
        attend.call_dense(
            (*arrays, alibi_slopes, sinks, *self._scales, None), (scale, int(causal), *module._thread_numbers)
        )
