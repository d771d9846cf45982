"""Which range of which sequence a work item is: found on the GPU from context_lens, so that every launch is the same.

A sequence's keys, from the first that is seen to the last, are cut at multiples of a length that goes by their number
alone: ranges are at the same positions in every batch, and so are the sums of which a result consists. The length is
the tiling's range_tokens, doubled until there are no more than its most_ranges of that number of keys. The first range
begins where the first key is seen, in the midst of a block.

Items are numbered sequence after sequence; of several query tokens each range has an item for each tile of rows, one
after another, which read the same keys. A launch has as many workers whatever the lengths are; each takes the items
that are as many apart. Every warp finds its own, from the same integers: no kernel leaves a plan for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.cuda.tiles import WARP, CudaTiling
from pa_compiler.kernels.rows import first_seen, limit
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

ALL_LANES = 0xFFFFFFFF

SEQ, BEGIN, END, RANGES, LENGTH, RANGE, TILE = range(7)
"""What find_item finds: the sequence, -1 if there are fewer items; its range from the first token to one past the last;
the ranges that the sequence has; its tokens; which of its ranges this one is, and which tile of rows."""


class Sequences(NamedTuple):
    """The sequences of a call.

    Attributes:
        spec: Of the call.
        batch: How many.
        context_lens: Arrays.context_lens.
        query_start_loc: Arrays.query_start_loc; None in decode, where each has one query token.
    """

    spec: PagedAttentionSpec
    batch: Expr
    context_lens: Buffer
    query_start_loc: Buffer | None

    def start(self, seq: Expr) -> Expr:
        """Where a sequence's query tokens begin."""
        return seq if self.query_start_loc is None else self.query_start_loc[seq]

    def num_tokens(self, seq: Expr) -> Expr:
        """Its query tokens."""
        return T.int32(1) if self.query_start_loc is None else self.start(seq + 1) - self.start(seq)

    def first_pos(self, seq: Expr) -> Expr:
        """The position of its first query token."""
        return self.context_lens[seq] - self.num_tokens(seq)

    def keys(self, seq: Expr) -> tuple[Expr, Expr]:
        """The first key that its query tokens see, and one past the last.

        Of several query tokens all keys where the spec has a mask, whose bounds need not rise from one to the next: of
        a range that no row sees a state is left, and nothing read.
        """
        length = self.context_lens[seq]
        if self.query_start_loc is None:
            return first_seen(self.spec, length), limit(self.spec, length)
        if self.spec.mask_mod is not None:
            return T.int32(0), length
        return first_seen(self.spec, length, self.first_pos(seq) + 1), length

    def num_ranges(self, tiling: CudaTiling, seq: Expr) -> Expr:
        """Its ranges; 1 where nothing is seen."""
        seen, after = self.keys(seq)
        places = range_places(tiling, after - seen)
        return T.Select(seen < after, T.shift_right(after - 1, places) - T.shift_right(seen, places) + 1, 1)

    def num_tiles(self, tiling: CudaTiling, seq: Expr) -> Expr:
        """Tiles of rows of each range, in a kv head; in decode those of a group, which are no items of their own."""
        if self.query_start_loc is None:
            return T.int32(1)
        return T.truncdiv(self.num_tokens(seq) * self.spec.group + tiling.row_tile - 1, tiling.row_tile)


def range_places(tiling: CudaTiling, num_keys: Expr) -> Expr:
    """log2 of the tokens of a range, of a sequence with so many keys from the first that is seen to the last."""
    longest = tiling.range_tokens * tiling.most_ranges  # keys that are cut into ranges of range_tokens
    surplus = T.Cast("float32", T.truncdiv(T.max(num_keys - 1, 0), longest))
    exponent = T.Cast("int32", T.shift_right(T.cuda.float_as_uint(surplus), T.uint32(23)))
    doublings = T.max(exponent - 126, 0)  # 1 more than the power of two in surplus; 0 of 0
    return tiling.range_tokens.bit_length() - 1 + doublings


def find_item(tiling: CudaTiling) -> Callable[..., None]:
    """found = [SEQ, BEGIN, END, RANGES, LENGTH, RANGE, TILE], int32, of an item.

    Warp-wide: all lanes of a warp call it and get the same.
    """

    @inline
    def stage(sequences, item, lane, found):
        found[SEQ] = -1
        before: T.int32 = 0  # items of the sequences before these 32
        first: T.int32 = 0
        while (found[SEQ] < 0) & (first < sequences.batch):
            count: T.int32 = 0
            if first + lane < sequences.batch:
                count = sequences.num_ranges(tiling, first + lane) * sequences.num_tiles(tiling, first + lane)
            end: T.int32 = count
            for level in T.unroll(5):
                below: T.let = T.cuda.__shfl_up_sync(T.uint32(ALL_LANES), end, 1 << level, WARP)
                end = T.Select(lane >= (1 << level), end + below, end)
            hits: T.let = T.cuda.ballot_sync(T.uint32(ALL_LANES), T.Cast("int32", before + end > item))
            if hits != T.uint32(0):
                owner: T.let = T.cuda.ffs_u32(hits) - 1
                number: T.let = T.cuda.__shfl_sync(T.uint32(ALL_LANES), item - before - end + count, owner, WARP)
                found[SEQ] = first + owner
                tiles = T.meta_var(sequences.num_tiles(tiling, found[SEQ]))
                found[RANGE] = T.truncdiv(number, tiles)
                found[TILE] = T.truncmod(number, tiles)
                found[RANGES] = sequences.num_ranges(tiling, found[SEQ])
                found[LENGTH] = sequences.context_lens[found[SEQ]]
                seen: T.int32 = sequences.keys(found[SEQ])[0]
                after: T.int32 = sequences.keys(found[SEQ])[1]
                places: T.int32 = range_places(tiling, after - seen)
                nth: T.int32 = T.shift_right(seen, places) + found[RANGE]
                found[BEGIN] = T.max(seen, T.shift_left(nth, places))
                found[END] = T.min(after, T.shift_left(nth + 1, places))
            before = before + T.cuda.__shfl_sync(T.uint32(ALL_LANES), end, WARP - 1, WARP)
            first = first + WARP

    return stage


def find_sequence() -> Callable[..., None]:
    """found[SEQ] = the sequence of a query token. Warp-wide."""

    @inline
    def stage(sequences, token, lane, found):
        before: T.uint32 = T.uint32(0)
        for i in range(T.truncdiv(sequences.batch + (WARP - 1), WARP)):
            if i * WARP + lane < sequences.batch:
                before = before + T.Select(
                    sequences.query_start_loc[i * WARP + lane + 1] <= token, T.uint32(1), T.uint32(0)
                )
        found[SEQ] = T.Cast("int32", T.cuda.reduce_add_sync_u32(T.uint32(ALL_LANES), before))

    return stage


def find_tree() -> Callable[..., None]:
    """start[0] = where a sequence's matrix of a tree_mask begins: behind those of all before it. Warp-wide."""

    @inline
    def stage(sequences, seq, lane, start):
        cells: T.uint32 = T.uint32(0)
        for i in range(T.truncdiv(seq + (WARP - 1), WARP)):
            if i * WARP + lane < seq:
                count: T.let = T.Cast("uint32", sequences.num_tokens(i * WARP + lane))
                cells = cells + count * count
        start[0] = T.Cast("int32", T.cuda.reduce_add_sync_u32(T.uint32(ALL_LANES), cells))

    return stage
