"""The attention functions of TVM's cache: decode, prefill over pages and over new tokens, and both for token trees.

Each is called by TVM with tensors that it has made views of, and calls a module once, on views of the same memory:
keys are pages[:, 0] and values pages[:, 1] in HND, new tokens are blocks of one token, and page tables are pairs. lse
is made base 2 in its place. What is copied is said where it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pa_compiler.integrations.relax.arrays import LOG2_E, Array, Context, array, paged_context, pieces
from pa_compiler.integrations.relax.rotary import Rotary
from pa_compiler.runtime.module import Module


def seen(batch: Any, head: Any, query_pos: Any, key_pos: Any, *, sinks: Any, begins: Any, shifts: Any) -> Any:
    """The mask_mod of windows: attention sinks, a window that begins at a position, and one that moves with queries."""
    retained = (key_pos < sinks[batch]) | (key_pos >= begins[batch])
    return retained & (key_pos >= query_pos + shifts[batch])


WINDOW_INPUTS = dict.fromkeys(("sinks", "begins", "shifts"), ("int32", ("batch",)))
"""The inputs of such a spec."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the functions share.

    Attributes:
        paged: A module over pages, HND, with merge_states.
        windowed: The same with the mask `seen`, or None.
        ragged: A module over blocks of one token, NHD.
        rotary: What rotates queries and keys where TVM asks for it in the attention.
        window: Keys that a query token of a sliding layer sees, or None.
    """

    paged: Module
    windowed: Module | None
    ragged: Module
    rotary: Rotary
    window: int | None

    def caches(self, pages: Any) -> tuple[Array, Array]:
        """Keys and values of TVM's pages [num_pages, 2, num_kv_heads, page_size, head_dim], the same memory.

        Raises:
            ValueError: pages have another shape.
        """
        spec, found = self.paged.spec, array(pages)
        expected = (2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        if found.shape[1:] != expected:
            raise ValueError(f"pages: expected [num_pages, {', '.join(map(str, expected))}], got {list(found.shape)}")
        return found[:, 0], found[:, 1]

    def over(self, length_info: Any) -> Module:
        """The module for a length_info: [batch] or [3, batch].

        Raises:
            ValueError: it is [3, batch], and windows were left out.
        """
        if len(length_info.shape) == 1:
            return self.paged
        if self.windowed is None:
            raise ValueError("length_info: expected [batch], since there are no functions with windows, got [3, batch]")
        return self.windowed

    def decode(
        self,
        q: Any,
        pages: Any,
        page_indptr: Any,
        page_indices: Any,
        length_info: Any,
        k_rope_pos_offset: Any,
        q_rope_position: Any,
        output: Any,
        lse: Any,
        rotary_mode: int,
        rope_scale: float,
        rope_theta: float,
        sm_scale: float,
    ) -> None:
        """One query token of each sequence over its pages.

        Args:
            q: [batch, num_heads, head_dim].
            pages: [num_pages, 2, num_kv_heads, page_size, head_dim].
            page_indptr: [batch + 1], int32.
            page_indices: [n], int32.
            length_info: [batch] or [3, batch], int32: paged_context.
            k_rope_pos_offset: [batch], int32: the position of the first key of each sequence, for rotary_mode.
            q_rope_position: [batch], int32.
            output: [batch, num_heads, head_dim], written.
            lse: [batch, num_heads], float32, written, base 2. -inf where a sequence has no key.
            rotary_mode: Whether queries and keys are to be rotated here; a copy of both is, then.
            rope_scale: Factor on positions.
            rope_theta: Base of the frequencies.
            sm_scale: Factor on scores.

        Raises:
            As Module.decode; ValueError by the name of a shape or a mode that is not covered.
        """
        caches, context, module = self.caches(pages), self._context(page_indptr, page_indices, length_info), None
        queries = array(q)
        if rotary_mode:
            queries = self.rotary.rotated(queries, array(q_rope_position), rope_theta, rope_scale)
            caches, context = self.rotary.gathered(*caches, context, array(k_rope_pos_offset), rope_theta, rope_scale)
            module = self.ragged
        module, out, sums = module or self.over(length_info), array(output), array(lse)
        table = (context.indptr, context.indices)
        module.decode(queries, *caches, table, context.lens, sm_scale, out, lse=sums, inputs=context.inputs)
        np.multiply(sums, LOG2_E, out=sums)

    def prefill(
        self,
        q: Any,
        qo_indptr: Any,
        pages: Any,
        page_indptr: Any,
        page_indices: Any,
        length_info: Any,
        k_rope_pos_offset: Any,
        q_rope_position: Any,
        output: Any,
        lse: Any,
        causal: int,
        rotary_mode: int,
        rope_scale: float,
        rope_theta: float,
        sm_scale: float,
    ) -> None:
        """Any number of query tokens of each sequence over its pages.

        Arguments are those of decode, and qo_indptr [batch + 1], int32: where the query tokens of each sequence begin.
        Where causal is 0 all of them see all of their sequence, as tokens that stand after it. Otherwise, of a
        length_info [batch], they are the last of their sequence and see nothing after themselves; of [3, batch] they
        stand after it, and see the keys that are in the window of their positions.

        Raises:
            As Module.attend; ValueError by the name of a shape or a mode that is not covered.
        """
        caches, context, module = self.caches(pages), self._context(page_indptr, page_indices, length_info), None
        queries, starts, in_window = array(q), array(qo_indptr), causal and context.inputs is not None
        if in_window:
            self._check_window(context, rotary_mode)
        if rotary_mode:
            queries = self.rotary.rotated(queries, array(q_rope_position), rope_theta, rope_scale)
            caches, context = self.rotary.gathered(*caches, context, array(k_rope_pos_offset), rope_theta, rope_scale)
            module = self.ragged
        module = module or self.over(length_info)
        self._attend(module, queries, caches, starts, context, output, lse, sm_scale, causal, in_window)

    def ragged_prefill(
        self,
        q: Any,
        qo_indptr: Any,
        k: Any,
        v: Any,
        kv_indptr: Any,
        q_rope_position: Any,
        k_rope_pos_offset: Any,
        output: Any,
        lse: Any,
        causal: int,
        rotary_mode: int,
        rope_scale: float,
        rope_theta: float,
        sm_scale: float,
    ) -> None:
        """Query tokens over the keys and values of new tokens, which are not in pages.

        Arguments are those of prefill, but for k and v [num_tokens, num_kv_heads, head_dim] in place of pages, and
        kv_indptr [batch + 1], int32, which says where the tokens of each sequence begin.

        Raises:
            As Module.attend; ValueError by the name of a shape or a mode that is not covered.
        """
        queries, keys, values = array(q), array(k), array(v)
        context = self.tokens(keys, array(kv_indptr))
        if rotary_mode:
            queries = self.rotary.rotated(queries, array(q_rope_position), rope_theta, rope_scale)
            at = self.rotary.positions(context, array(k_rope_pos_offset))
            keys = self.rotary.rotated(keys, at, rope_theta, rope_scale)
        caches = keys[:, None], values[:, None]
        self._attend(self.ragged, queries, caches, array(qo_indptr), context, output, lse, sm_scale, causal, False)

    def _context(self, page_indptr: Any, page_indices: Any, length_info: Any) -> Context:
        self.over(length_info)
        return paged_context(page_indptr, page_indices, length_info, self.paged.spec.block_size)

    def tokens(self, keys: Array, starts: Array) -> Context:
        """The tokens of each sequence as blocks of one."""
        return Context(starts, np.arange(len(keys), dtype=np.int32), starts[1:] - starts[:-1])

    def _check_window(self, context: Context, rotary_mode: int) -> None:
        """Check that a window that moves with the query tokens is covered.

        Raises:
            ValueError: the spec has no window, a sequence has an attention sink besides, or keys are to be rotated.
        """
        if self.window is None:
            raise ValueError("window: expected one in the spec, for layers of the kind MHA_SLIDING, got None")
        if rotary_mode:
            raise ValueError("rotary_mode: expected 0 in layers of the kind MHA_SLIDING, got 1 (RopeMode.INLINE)")
        if context.inputs is not None and context.inputs["sinks"].any():
            raise ValueError("length_info: expected no attention sinks in layers of the kind MHA_SLIDING")

    def _attend(
        self,
        module: Module,
        queries: Array,
        caches: tuple[Array, Array],
        starts: Array,
        context: Context,
        output: Any,
        lse: Any,
        scale: float,
        causal: int,
        in_window: Any,
    ) -> None:
        """attend to a context that the query tokens are the last of where it is causal, and stand after otherwise."""
        out, sums = array(output), array(lse)
        is_causal = bool(causal and not in_window)
        if not len(context.indices) and not is_causal:
            out[:], sums[:] = 0, -np.inf
            return
        empty = None
        if not is_causal:
            cut = pieces(starts, context)
            starts, context, empty = cut.starts, cut.context, cut.empty
            if in_window and context.inputs is not None and self.window is not None:
                shifts = np.diff(starts) + cut.offsets - np.int32(self.window - 1)
                context.inputs["shifts"] = shifts.astype(np.int32)
        table = (context.indptr, context.indices)
        arrays = (queries, *caches, table, context.lens, starts, scale, out)
        module.attend(*arrays, lse=sums, causal=is_causal, inputs=context.inputs)
        if empty is not None and len(empty):
            out[empty], sums[empty] = 0, -np.inf
        np.multiply(sums, LOG2_E, out=sums)
