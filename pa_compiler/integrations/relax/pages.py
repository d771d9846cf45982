"""The functions that write, copy and show TVM's pages, and that merge results of attention in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pa_compiler.integrations.relax.arrays import LOG2_E, array
from pa_compiler.integrations.relax.attention import Attention


@dataclasses.dataclass(frozen=True)
class Pages:
    """The functions of pages [num_pages, 2, num_kv_heads, page_size, head_dim], and of merging.

    Attributes:
        attention: What they share with the others.
    """

    attention: Attention

    def transpose_append(self, pages: Any, k: Any, v: Any, position_map: Any) -> None:
        """Write the keys and values of new tokens.

        Args:
            pages: Written.
            k: [num_tokens, num_kv_heads, head_dim].
            v: [num_tokens, num_kv_heads, head_dim].
            position_map: [num_tokens], int32: page * page_size + place in it; -1 for none.

        Raises:
            As Module.append_kv.
        """
        self.attention.paged.append_kv(array(k), array(v), *self.attention.caches(pages), array(position_map))

    def copy_single_page(self, pages: Any, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a page, with keys and values, to another page."""
        self.attention.caches(pages)
        found = array(pages)
        found[target, :, :, :length] = found[source, :, :, :length]

    def compact_copy(self, pages: Any, copy_length_indptr: Any, copy_src_dst_pos: Any, batch_size: int) -> None:
        """Move tokens within pages, one after another, as where a token tree was accepted.

        Args:
            pages: Written.
            copy_length_indptr: [batch_size + 1], int32: where the moves of each sequence begin.
            copy_src_dst_pos: [2, n], int32: from where to where, page * page_size + place in it.
            batch_size: Sequences.
        """
        self.attention.caches(pages)
        found, page_size = array(pages), self.attention.paged.spec.block_size
        moves = array(copy_src_dst_pos)[:, : array(copy_length_indptr)[batch_size]]
        for source, target in moves.T:
            from_page, to_page = source // page_size, target // page_size
            found[to_page, :, :, target % page_size] = found[from_page, :, :, source % page_size]

    def debug_get_kv(self, pages: Any, position_map: Any, k: Any, v: Any, layer: int) -> None:
        """Copy the keys and values of tokens out of the pages of a layer.

        Args:
            pages: Read.
            position_map: [num_tokens], int32: page * page_size + place in it.
            k: [num_layers, num_tokens, num_kv_heads, head_dim], written at the layer.
            v: The same.
            layer: Number of the layer.
        """
        keys, values = self.attention.caches(pages)
        blocks, slots = np.divmod(array(position_map), self.attention.paged.spec.block_size)
        array(k)[layer], array(v)[layer] = keys[blocks, :, slots], values[blocks, :, slots]

    def merge_state_inplace(self, v: Any, s: Any, v_other: Any, s_other: Any) -> None:
        """Merge the results of attention to two sets of keys into the first. Both are copied side by side before.

        Args:
            v: [num_tokens, num_heads, head_dim], written.
            s: [num_tokens, num_heads], float32, base 2, written.
            v_other: As v.
            s_other: As s.

        Raises:
            As Module.merge_states.
        """
        out, sums = array(v), array(s)
        lses = np.stack((sums, array(s_other)))
        lses /= LOG2_E
        self.attention.paged.merge_states(np.stack((out, array(v_other))), lses, out, sums)
        np.multiply(sums, LOG2_E, out=sums)
