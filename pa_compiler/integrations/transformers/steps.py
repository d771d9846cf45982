"""Where the tokens of one forward pass go in a paged cache, and what its query tokens attend to.

A column is a place in the rectangle of tokens that transformers works on, padding among them. Padding is on the left: a
token's position in its sequence is its column less the padding of its row, and padding is nowhere in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Step(NamedTuple):
    """What all layers of one forward pass have in common, as append_kv, decode and attend take it.

    Attributes:
        slots: [batch * columns that are appended], int64; -1 for padding.
        block_table: [batch, blocks], int32.
        context_lens: [batch], int32.
        query_start_loc: [batch + 1], int32, or None where each sequence has one query token.
        rows: [tokens], int64: which of [batch * query columns] are query tokens, or None where all are.
    """

    slots: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    rows: torch.Tensor | None


def make_step(
    batch: int, blocks: int, block_size: int, total: int, appended: int, queries: int, mask: torch.Tensor | None
) -> Step:
    """A forward pass over sequences that each have blocks of their own, one sequence's behind the other's.

    Args:
        batch: Sequences.
        blocks: Of each sequence.
        block_size: Tokens of a block.
        total: Columns of keys after this pass.
        appended: The last of these, which come with it.
        queries: The last of these that have queries.
        mask: [batch, total], bool: False for padding. None where there is none.

    Raises:
        ValueError: there is padding that is not on the left, or mask has another shape.
    """
    padding = None if mask is None else left_padding(mask, batch, total)
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    first = torch.arange(batch)[:, None] * (blocks * block_size)
    starts = None if queries == 1 else torch.arange(0, batch * queries + 1, queries, dtype=torch.int32)
    if padding is None:
        slots = first + torch.arange(total - appended, total)
        return Step(slots.view(-1), table, torch.full((batch,), total, dtype=torch.int32), starts, None)
    at = torch.arange(total - appended, total) - padding[:, None]
    slots = torch.where(at >= 0, first + at, -1).view(-1)
    lens = (total - padding).int()
    seen = torch.arange(total - queries, total) >= padding[:, None]
    if seen.all():
        return Step(slots, table, lens, starts, None)
    starts = torch.nn.functional.pad(seen.sum(1).cumsum(0), (1, 0)).int()
    return Step(slots, table, lens, starts, seen.view(-1).nonzero()[:, 0])


def left_padding(mask: torch.Tensor, batch: int, total: int) -> torch.Tensor | None:
    """[batch], int64: the padding of each sequence. None where there is none.

    Raises:
        ValueError: it is not on the left alone, or mask is not [batch, total].
    """
    if mask.shape != (batch, total):
        raise ValueError(f"attention_mask: expected shape [{batch}, {total}], got {list(mask.shape)}")
    if mask.all():
        return None
    padding = total - mask.sum(1)
    if not torch.equal(mask, torch.arange(total) >= padding[:, None]):
        raise ValueError(
            "attention_mask: expected padding on the left alone, got a row with a gap after its first token"
        )
    return padding
