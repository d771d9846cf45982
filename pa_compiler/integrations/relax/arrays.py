"""TVM's tensors as NumPy arrays of the same memory, and its page tables as the arguments of attend."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pa_compiler.runtime.arguments import NUMPY_DTYPES

Array = np.ndarray[Any, Any]

LOG2_E = np.float32(1.4426950408889634)
"""The logarithm to base 2, which TVM has, over the natural one, which ours has."""

_BFLOAT16 = NUMPY_DTYPES["bfloat16"]


def array(tensor: Any) -> Array:
    """A tensor of TVM as an array of the same memory, its offset in bytes included. Third of a microsecond.

    bfloat16, which DLPack has and NumPy's reader has not, goes by way of uint16, which takes some microseconds.
    """
    if tensor.dtype == "bfloat16":
        words: Array = np.from_dlpack(tensor._create_view(tensor.shape, "uint16"))
        return words.view(_BFLOAT16)
    found: Array = np.from_dlpack(tensor)
    return found


class Context(NamedTuple):
    """What the query tokens of each sequence are attended to: so many tokens in the blocks of a table.

    Attributes:
        indptr: [batch + 1], int32: where the blocks of each sequence begin in indices.
        indices: [n], int32: block ids.
        lens: [batch], int32: tokens of each sequence.
        inputs: {name: [batch]}, int32: those of a spec's mask_mod, or None.
    """

    indptr: Array
    indices: Array
    lens: Array
    inputs: dict[str, Array] | None = None


def paged_context(page_indptr: Any, page_indices: Any, length_info: Any, page_size: int) -> Context:
    """The context that TVM's page table and length_info [batch] describe.

    Args:
        page_indptr: [batch + 1], int32.
        page_indices: [n], int32.
        length_info: [batch], int32: tokens in the last page of each sequence that has one. Or [3, batch]: these, the
            begin of the window, and the length of the attention sink, as positions in the sequence's pages. Keys
            between the sink and the window are not seen.
        page_size: Tokens of a page.
    """
    indptr, info = array(page_indptr), array(length_info)
    if info.ndim == 1:
        return Context(indptr, array(page_indices), _lens(indptr, info, page_size))
    inputs = {"sinks": info[2], "begins": info[1], "shifts": np.full(info.shape[1], _NO_SHIFT, np.int32)}
    return Context(indptr, array(page_indices), _lens(indptr, info[0], page_size), inputs)


_NO_SHIFT = -(1 << 30)
"""As shifts of a mask: no key is hidden by the distance from its query token."""


def _lens(indptr: Array, last_page_len: Array, page_size: int) -> Array:
    """Tokens of each sequence: its whole pages, and those in its last page; 0 where it has no page."""
    pages = indptr[1:] - indptr[:-1]
    lens = pages * np.int32(page_size) + last_page_len - np.int32(page_size)
    return np.where(pages > 0, lens, np.int32(0))


class Pieces(NamedTuple):
    """Query tokens and their contexts, cut so that no piece has more query tokens than its context has tokens.

    Query tokens that TVM attends to a cache stand after it, and may be more than it holds. To attend they are the last
    of the context, and see all of it.

    Attributes:
        starts: [pieces + 1], int32: where the query tokens of each piece begin.
        context: That of each piece.
        rows: [pieces]: the sequence of each piece.
        offsets: [pieces]: query tokens of its sequence before it.
        empty: Query tokens [n] that have no context. They are attended to one token of any page, to no purpose.
    """

    starts: Array
    context: Context
    rows: Array
    offsets: Array
    empty: Array


def pieces(starts: Array, context: Context) -> Pieces:
    """Cut the query tokens of each sequence. Nothing is copied where no sequence has more of them than tokens.

    Args:
        starts: [batch + 1], int32: where the query tokens of each sequence begin.
        context: That of each sequence, of at least one block.
    """
    counts, lens = starts[1:] - starts[:-1], context.lens
    if (counts <= lens).all():
        rows = np.arange(len(lens))
        return Pieces(starts, context, rows, np.zeros(len(lens), np.int32), rows[:0])
    sizes = np.maximum(lens, 1)
    parts = -(-counts // sizes)
    rows = np.repeat(np.arange(len(lens)), parts)
    offsets = (within(parts) * sizes[rows]).astype(np.int32)
    blocks = np.diff(context.indptr)
    indptr = np.concatenate(([0], np.cumsum(np.maximum(blocks, 1)[rows])))
    places = np.repeat(context.indptr[rows], np.maximum(blocks, 1)[rows]) + within(np.maximum(blocks, 1)[rows])
    places[np.repeat(blocks[rows] == 0, np.maximum(blocks, 1)[rows])] = 0  # any page of another sequence
    inputs = context.inputs and {name: values[rows] for name, values in context.inputs.items()}
    cut = Context(indptr.astype(np.int32), context.indices[places], sizes[rows].astype(np.int32), inputs)
    first = starts[rows] + offsets
    ends = np.append(first, starts[-1]).astype(np.int32)
    return Pieces(ends, cut, rows, offsets, first[lens[rows] == 0])


def within(counts: Array) -> Array:
    """0, 1, ... count - 1 for each count, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
