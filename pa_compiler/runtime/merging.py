"""merge_states, the call that takes results of parts of the keys; and what all calls of a library have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pa_compiler.interface import CPU_ENTRY_POINTS, Parameter, with_inputs
from pa_compiler.runtime import results
from pa_compiler.runtime.elsewhere import Functions
from pa_compiler.runtime.entry_points import EntryPoint
from pa_compiler.runtime.thread_settings import ThreadSettings
from pa_compiler.spec import PagedAttentionSpec


class Merging(ThreadSettings):
    """How a Module calls its library, and the call that needs no cache."""

    spec: PagedAttentionSpec
    pipeline: str
    _functions: Functions
    _entry_points: Mapping[str, tuple[Parameter, ...]] = CPU_ENTRY_POINTS
    _on_gpu = False
    _merge_states: EntryPoint | None

    def _entry_point(self, name: str) -> EntryPoint:
        parameters = self._entry_points[name]
        if name in ("decode", "attend", "attend_shared_prefix"):
            parameters = with_inputs(parameters, self.spec)
        return EntryPoint(self._functions[name], parameters, self.spec, self._on_gpu)

    def _found(self, name: str) -> EntryPoint | None:
        return self._entry_point(name) if self._functions.implements_function(name) else None

    def merge_states(
        self,
        outs: Any,
        lses: Any,
        out: Any = None,
        lse: Any = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Merge the results of attention to parts of the keys into the result of attention to all of them.

        Parts are what decode and attend give of some of the keys each: of some pages, in another call or on another
        machine. out is the average of outs weighed by exp(lse), lse the logarithm of the sum of exp(lses).

        Args:
            outs: [parts, num_tokens, num_heads, value_dim], out_dtype or float32; one part at least. Arrays are of the
                same kinds as decode's, and as free in their strides.
            lses: [parts, num_tokens, num_heads], float32: natural logarithms, as decode and attend give them.
            out: [num_tokens, num_heads, value_dim] or [num_tokens, num_heads * value_dim], out_dtype, written and
                returned; by default a new array [num_tokens, num_heads, value_dim] of the kind of outs.
            lse: [num_tokens, num_heads], float32, written like out. Giving it implies return_lse.
            return_lse: Whether to return lse as well.

        Returns:
            out, or (out, lse). A part whose lse is -inf is empty: it changes nothing, whatever its out, be it NaN.
            Where all are, out is 0 and lse -inf. Where the spec has sinks, they are to be given to the call of one part
            alone, and to the others as -inf: here nothing is added.

        Raises:
            NotImplementedError: the library was compiled without merge_states=True.
            TypeError, ValueError: as decode, of arrays.
            RuntimeError: this CPU lacks features that the module is built for.
            Everything is checked before anything is written; contents of the arrays must not change meanwhile.
        """
        if self._merge_states is None:
            raise NotImplementedError(
                "merge_states: expected a module compiled with merge_states=True, got one without"
            )
        if out is None:
            out = self._new_like(outs, self.spec.result_dtype, (self.spec.num_heads, self.spec.result_dim), axis=1)
        if return_lse and lse is None:
            lse = self._new_like(outs, "float32", (self.spec.num_heads,), axis=1)
        self._merge_states.call((outs, lses, out, lse), self._manner(None, "merge_states"))
        return out if lse is None else (out, lse)

    @property
    def has_merge_states(self) -> bool:
        """Whether the library has merge_states: where it was compiled with it."""
        return self._merge_states is not None

    def _manner(self, check: str | None, of: str) -> tuple[int, ...]:
        """The numbers that tell the library how to go about a call; for a CPU, the threads."""
        if check not in (None, "host"):
            raise ValueError(f"check: expected 'host' for a CPU module, got {check!r}")
        return self._thread_numbers

    def _new_like(self, given: Any, dtype: str, extents: tuple[int, ...], axis: int = 0) -> Any:
        return results.new_like(given, dtype, extents, self._functions, axis)
