"""Attention of token trees, as speculative decoding has them: TVM's order of a tree's nodes becomes a mask.

TVM says of each node where it is in the order of a walk through the tree, and where its descendants end: node i sees
node j where order[j, 0] <= order[i, 0] < order[j, 1]. Attend takes a matrix for the query tokens of each sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pa_compiler.integrations.relax.arrays import LOG2_E, Array, Context, array, paged_context, pieces
from pa_compiler.integrations.relax.attention import Attention
from pa_compiler.runtime.module import Module


@dataclasses.dataclass(frozen=True)
class TreeAttention:
    """The two functions of trees: over pages, and over new tokens.

    Attributes:
        attention: What they share with the others.
    """

    attention: Attention

    def paged(
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
        rotary_mode: int,
        rope_scale: float,
        rope_theta: float,
        sm_scale: float,
        tree_order_indptr: Any,
        tree_order: Any,
    ) -> None:
        """The nodes of trees that are in the pages, of which the query tokens are the last, and what is before them.

        Arguments are those of Attention.prefill, and tree_order_indptr [batch + 1], int32, which says where the nodes
        of each sequence begin in tree_order [nodes, 2], int32: the place of a node in the order, and where its
        descendants end. A sequence without nodes has query tokens that see all of its pages.

        Raises:
            As Module.attend; ValueError by the name of what is not covered.
        """
        _check(rotary_mode, length_info)
        context = paged_context(page_indptr, page_indices, length_info, self.attention.paged.spec.block_size)
        caches, order = self.attention.caches(pages), (array(tree_order_indptr), array(tree_order))
        _attend(self.attention.paged, array(q), caches, array(qo_indptr), context, order, output, lse, sm_scale)

    def ragged(
        self,
        q: Any,
        qo_indptr: Any,
        k: Any,
        v: Any,
        kv_indptr: Any,
        q_rope_position: Any,
        tree_order_indptr: Any,
        tree_order: Any,
        output: Any,
        lse: Any,
        rotary_mode: int,
        rope_scale: float,
        rope_theta: float,
        sm_scale: float,
    ) -> None:
        """The nodes of trees over the keys and values of new tokens: arguments as those of `paged` and ragged_prefill.

        Raises:
            As Module.attend; ValueError by the name of what is not covered.
        """
        _check(rotary_mode)
        keys, values = array(k), array(v)
        context = self.attention.tokens(keys, array(kv_indptr))
        caches, order = (keys[:, None], values[:, None]), (array(tree_order_indptr), array(tree_order))
        _attend(self.attention.ragged, array(q), caches, array(qo_indptr), context, order, output, lse, sm_scale)


def _check(rotary_mode: int, length_info: Any = None) -> None:
    if rotary_mode:
        raise ValueError("rotary_mode: expected 0 in attention of token trees, got 1 (RopeMode.INLINE)")
    if length_info is not None and len(length_info.shape) != 1:
        raise ValueError(f"length_info: expected [batch] in attention of token trees, got {list(length_info.shape)}")


def _attend(
    module: Module,
    queries: Array,
    caches: tuple[Array, Array],
    starts: Array,
    context: Context,
    order: tuple[Array, Array],
    output: Any,
    lse: Any,
    scale: float,
) -> None:
    """Attend with the masks of trees.

    Where nodes of a tree are in the pages that are no query tokens any more, they are query tokens once more, with
    queries of zeros: then queries, out and lse are copied.
    """
    out, sums, counts, nodes = array(output), array(lse), np.diff(starts), np.diff(order[0])
    _check_nodes(counts, nodes, context.lens)
    if not len(context.indices):
        out[:], sums[:] = 0, -np.inf
        return
    taken = np.maximum(counts, nodes)
    is_whole = bool((taken == counts).all())
    ends = np.append(np.int32(0), np.cumsum(taken, dtype=np.int32))
    cut = pieces(ends, context)
    masks = [_mask(order, row, size) for row, size in zip(cut.rows, np.diff(cut.starts), strict=True)]
    tree_mask = np.concatenate(masks, axis=None) if masks else np.zeros(0, bool)
    table, sums_, out_ = (cut.context.indptr, cut.context.indices), sums, out
    if not is_whole:
        places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends[1:], counts, strict=True)])
        given, queries = queries, np.zeros((ends[-1], *queries.shape[1:]), queries.dtype)
        queries[places] = given
        out_, sums_ = np.empty_like(queries), np.empty(queries.shape[:2], np.float32)
    arrays = (queries, *caches, table, cut.context.lens, cut.starts, scale, out_)
    module.attend(*arrays, lse=sums_, tree_mask=tree_mask)
    out_[cut.empty], sums_[cut.empty] = 0, -np.inf
    if not is_whole:
        out[:], sums[:] = out_[places], sums_[places]
    np.multiply(sums, LOG2_E, out=sums)


def _check_nodes(counts: Array, nodes: Array, lens: Array) -> None:
    """Check that the query tokens of each tree are nodes of it, and its nodes tokens of its sequence."""
    wrong = (nodes > 0) & ((nodes < counts) | (nodes > lens))
    if wrong.any():
        each = int(np.argmax(wrong))
        raise ValueError(
            f"tree_order_indptr: expected from {counts[each]} query tokens to {lens[each]} tokens as the nodes of "
            f"sequence {each}, or none, got {nodes[each]}"
        )


def _mask(order: tuple[Array, Array], row: int, size: int) -> Array:
    """[size, size], bool: which query tokens of a piece see which."""
    begin, end = order[0][row], order[0][row + 1]
    if begin == end:
        return np.ones((size, size), bool)
    first, last = order[1][begin:end].T
    seen: Array = (first <= first[:, None]) & (first[:, None] < last)
    return seen
