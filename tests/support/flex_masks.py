"""Masks as FlexAttention's users write them, for torch and for a compiler that has never seen them.

A function of MASKS takes the number of query heads and returns a mask_mod. Tensors that a mask closes over are of
SEQUENCES sequences and of POSITIONS positions.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import and_masks, or_masks

SEQUENCES = 4
POSITIONS = 1024


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(heads):
    def sliding_window_causal(b, h, q_idx, kv_idx):
        causal_mask = q_idx >= kv_idx
        window_mask = q_idx - kv_idx <= 99
        return causal_mask & window_mask

    return sliding_window_causal


def prefix_lm(heads):
    """A prefix that every query sees, and after it the last 64 tokens."""
    prefix_lengths = torch.tensor([1, 9, 40, 130])

    def prefix_mask(b, h, q_idx, kv_idx):
        return kv_idx < prefix_lengths[b]

    def recent(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < 64)

    return or_masks(prefix_mask, recent)


def document(heads):
    """Sequences packed behind each other: 64-bit numbers of documents, as torch makes them."""
    lengths = torch.tensor([10, 110, 3, 177, 300, 424])
    document_id = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def document_mask(b, h, q_idx, kv_idx):
        return document_id[q_idx] == document_id[kv_idx]

    return and_masks(causal, document_mask)


def dilated(heads):
    def dilated_sliding_window(b, h, q_idx, kv_idx):
        diff = torch.abs(q_idx - kv_idx)
        in_window = diff <= 200
        is_dilated = (diff % 3) == 0
        return in_window & is_dilated

    return dilated_sliding_window


def first_and_last(heads):
    """Attention sinks as StreamingLLM has them."""

    def first_and_last_mask(b, h, q_idx, kv_idx):
        return (kv_idx < 4) | (q_idx - kv_idx < 100)

    return first_and_last_mask


def chunked(heads):
    """The local layers of Llama 4."""

    def chunked_mask(b, h, q_idx, kv_idx):
        return (q_idx // 256 == kv_idx // 256) & (q_idx >= kv_idx)

    return chunked_mask


def window_by_head(heads):
    windows = 1 << torch.arange(heads, dtype=torch.int32)

    def window_mask(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < windows[h]

    return window_mask


def strided(heads):
    """The strided pattern of sparse transformers."""

    def strided_mask(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx < 32) | ((q_idx - kv_idx) % 32 == 0)

    return strided_mask


def by_parity_of_head(heads):
    def mask(b, h, q_idx, kv_idx):
        local = q_idx - kv_idx <= 31
        summary = kv_idx % 32 >= 28
        return torch.where(h % 2 == 0, local, torch.logical_or(local, summary))

    return mask


def natten_1d(heads):
    """Neighborhood attention: the window is moved inwards at the ends."""

    def natten_mask(b, h, q_idx, kv_idx):
        center = q_idx.clamp(37 // 2, (POSITIONS - 1) - 37 // 2)
        return (center - kv_idx).abs() <= 37 // 2

    return natten_mask


def natten_2d(heads):
    """The same over an image, 26 tokens wide."""

    def get_x_y(idx):
        return idx // 26, idx % 26

    def natten_mask(b, h, q_idx, kv_idx):
        q_x, q_y = get_x_y(q_idx)
        kv_x, kv_y = get_x_y(kv_idx)
        kernel_x = q_x.clamp(6, POSITIONS // 26 - 1 - 6)
        kernel_y = q_y.clamp(6, 26 - 1 - 6)
        return ((kernel_x - kv_x).abs() <= 6) & ((kernel_y - kv_y).abs() <= 6)

    return natten_mask


def padding(heads):
    """Bidirectional, and padded: of the second sequence nothing is seen."""
    lengths = torch.tensor([1, 0, 77, 512])

    def padding_mask(b, h, q_idx, kv_idx):
        return kv_idx < lengths[b]

    return padding_mask


def checkerboard(heads):
    """By head; half of the heads see nothing of a sequence of one token."""

    def checkerboard_mask(b, h, q_idx, kv_idx):
        return (q_idx + kv_idx + h) % 2 == 0

    return checkerboard_mask


def block_sparse(heads):
    layout = torch.rand(heads, POSITIONS // 64, POSITIONS // 64, generator=torch.Generator().manual_seed(0)) < 0.4

    def block_mask(b, h, q_idx, kv_idx):
        return layout[h, q_idx // 64, kv_idx // 64]

    return block_mask


def hash_buckets(heads):
    """Positions are in one of 8 buckets, as in Reformer."""

    def bucket(idx, h):
        return ((idx * 40503) ^ (idx >> 3) ^ (h * 7)) % 8

    def hash_mask(b, h, q_idx, kv_idx):
        return (bucket(q_idx, h) == bucket(kv_idx, h)) | (q_idx == kv_idx)

    return hash_mask


def log_sparse(heads):
    """Distances that are powers of two."""

    def log_sparse_mask(b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        return (distance & (distance - 1)) == 0

    return log_sparse_mask


def tree(heads):
    """The last 30 tokens are drafts of a tree: the query sees those that are its ancestors, and all before them."""
    is_ancestor = torch.rand(SEQUENCES, 30, generator=torch.Generator().manual_seed(1)) < 0.5

    def tree_mask(b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        return (
            (distance >= 30) | (distance == 0) | is_ancestor[b, torch.minimum(distance, torch.full_like(distance, 29))]
        )

    return tree_mask


MASKS = {
    mask.__name__: mask
    for mask in (
        *(sliding_window, prefix_lm, document, dilated, first_and_last, chunked, window_by_head, strided),
        *(by_parity_of_head, natten_1d, natten_2d, padding, checkerboard, block_sparse, hash_buckets, log_sparse, tree),
    )
} | {"causal": lambda heads: causal}
