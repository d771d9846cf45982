"""Scales of caches of codes: what scores, and weights of values, are multiplied by. Matmuls know nothing of them.

A key's scale multiplies its score, and a value's scale its weight, once for all elements of a head. Where a cache or a
head has one scale, the key's is a factor of the scale of scores, and the value's one of what a tile adds to acc. Where
each token has one, both are gathered for the tokens of a tile. A weight of 0 stays 0, whatever the scale is: that of a
token which is not seen may be anything. Where zero points lie beside the scales, zero_points.py has what they add.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.arrays import BlockTable
from pa_compiler.kernels.caches import Cache, CacheAccess, whole
from pa_compiler.kernels.elements import UNITS, round_up_to_bfloat16
from pa_compiler.kernels.kept import Value, allocate, fill, stage_block
from pa_compiler.kernels.rows import begins_late
from pa_compiler.kernels.scores import Units, Zeros
from pa_compiler.kernels.state import Factors
from pa_compiler.kernels.tokens import Tile, token_offsets
from pa_compiler.spec import PACKED_TOKENS, PagedAttentionSpec
from pa_compiler.tiles import Tiling

STRIDES = ("ks_block", "ks_row", "ks_head", "vs_block", "vs_row", "vs_head")
"""Parameters of kernels: the strides of both arrays of scales, in elements."""


OFFSETS = ("key_scale_offsets", "value_scale_offsets")
"""The sblocks that look up where the scales of a tile's tokens lie, and their tables."""


class Scales(NamedTuple):
    """The scales of both caches, each in a span of memory whose rows are tokens; 0 where a stride has no axis.

    Their offsets are those of a tile's tokens, as of a cache, where tokens have scales. sums: [slots, rows], of each
    row of queries the sum of its elements, where there are zero points. units: of each its unit, where integers are
    multiplied.
    """

    keys: Cache
    values: Cache
    sums: Buffer | None = None
    units: Buffer | None = None


class OfHead(NamedTuple):
    """What the scores and the weights of one kv head are multiplied by, float32.

    Attributes:
        score: The scale of scores with the key's in it.
        scores: [tokens], the same for each token of a tile, in place of it; None where tokens have no scales.
        value: The value's scale.
        values: [tokens], the same for each token, in place of it.
        score_zeros, value_zeros: [tokens], the zero points of each, where there are any: the former with the scale of
            scores.
        sums, units: Scales.sums and Scales.units.
    """

    score: Expr
    scores: Buffer | None = None
    value: Expr | None = None
    values: Buffer | None = None
    score_zeros: Buffer | None = None
    value_zeros: Buffer | None = None
    sums: Buffer | None = None
    units: Buffer | None = None

    def zeros(self, slot: Expr) -> Zeros | None:
        """What zero points add to the scores of a slot of rows."""
        if self.score_zeros is None:
            return None
        return Zeros(self.score_zeros, self.sums, slot)

    def of_slot(self, slot: Expr) -> tuple[Buffer | None, Zeros | None, Units | None]:
        """What Scoring has of them for a slot of rows."""
        return self.scores, self.zeros(slot), None if self.units is None else Units(self.units, slot)


def unused(spec: PagedAttentionSpec) -> tuple[str, ...]:
    """The parameters of kernels that those of a spec do not have."""
    return () if spec.has_scales else STRIDES


def look_up_scales(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., Scales | None]:
    """(scales, what token_offsets takes) -> the scales with their offsets, where tokens have scales.

    Of the current tile alone: they are not fetched ahead. Where scales lie side by side, that of the first of them.
    """
    unit = side_by_side(spec, tiling)

    def slot_offset(slot: Expr, row_stride: Expr) -> Expr:
        return T.Cast("int64", slot - T.floormod(slot, unit) if unit > 1 else slot) * row_stride

    access = CacheAccess(slot_offset, _no_access, _no_access, _no_access, num_lines=1)
    stages = [token_offsets(spec, access, name) for name in OFFSETS]

    def stage(scales: Scales | None, table: BlockTable, tile: Tile, seq: Expr, last: Expr, *held: Any) -> Scales | None:
        if scales is None or not spec.token_scales:
            return scales
        found = []
        for name, offsets_stage, cache in zip(OFFSETS, stages, scales[:2], strict=True):
            offsets = allocate(name, (tiling.padded_kv_tile,), "int64")
            found.append(cache._replace(offsets=offsets))
            offsets_stage(table, found[-1], tile, seq, last, tile.num_groups * tiling.token_group, *held)
        return scales._replace(keys=found[0], values=found[1])

    return stage


def _no_access(*_: Expr) -> Expr:
    raise NotImplementedError("scales are read one by one")


def scales_of_head(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., OfHead]:
    """(scales, kv head, tile, the scale of scores) -> what the scores and weights of the head are multiplied by.

    Of tokens in the sblock head_scales, which gathers those of a tile.
    """
    unit = T.float32(UNITS.get(spec.cache_dtype, 1.0))
    tokens, group, in_row = tiling.padded_kv_tile, tiling.token_group, side_by_side(spec, tiling)
    numbers = 2 if spec.has_zeros else 1  # of a token, side by side

    def place(cache: Cache, head: Expr, t: Expr) -> Expr:
        if in_row == 1:
            return cache.offsets[t] + head
        first = T.floordiv(t, in_row) * in_row
        return cache.offsets[first] + head + T.Cast("int64", (t - first) * numbers)

    def stage(scales: Scales | None, kv_head: Expr, tile: Tile, scale: Expr) -> OfHead:
        if scales is None:
            return OfHead(scale)
        caches = keys, values = scales.keys, scales.values
        heads = [T.Cast("int64", kv_head) * cache.head for cache in caches]
        if not spec.token_scales:
            of_keys = T.bind(scale * (keys.memory[heads[0]] * unit))
            return OfHead(of_keys, value=T.bind(values.memory[heads[1]] * unit))
        names = [f"{of}_{what}" for what in ("scale", "zero")[:numbers] for of in ("key", "value")]
        found = [allocate(f"{name}s", (tokens,), "float32") for name in names]
        with stage_block(
            "head_scales", [whole(part) for each in caches for part in (each.memory, each.offsets)], found
        ):
            for number, (name, target) in enumerate(zip(names, found, strict=True)):
                cache, head, factor = caches[number % 2], heads[number % 2], (scale, None)[number % 2]

                def value(
                    t: Expr,
                    cache: Cache = cache,
                    head: Expr = head,
                    factor: Expr | None = factor,
                    nth: int = number // 2,
                ) -> Value:
                    at = place(cache, head, t)
                    found = cache.memory[at + T.int64(nth) if nth else at]
                    reads = [whole(cache.memory), whole(cache.offsets)]
                    return Value(found if factor is None else found * factor, reads)

                fill(name, target, value, tile.num_groups, group)
        of_zeros = found[2:] or [None, None]
        return OfHead(scale, found[0], None, found[1], of_zeros[0], of_zeros[1], scales.sums, scales.units)

    return stage


def side_by_side(spec: PagedAttentionSpec, tiling: Tiling) -> int:
    """So many columns have their scales side by side, in one block, those without a token too; 1 where no two have."""
    unit = math.gcd(tiling.token_group, PACKED_TOKENS)
    aligned = tiling.streams == 1 and (tiling.many_tokens or spec.kv_layout == "packed" or not begins_late(spec))
    return unit if aligned and spec.block_size % unit == 0 else 1


def weigh_values(tiling: Tiling) -> Callable[..., None]:
    """weighted[slot, r, t] = probs[slot, r, t] times the scale of the token's value, for num_groups token groups.

    The sblock weigh_values, where tokens have scales. Rounded to bfloat16 where pairs of such are multiplied.
    """
    rows, group = tiling.row_tile, tiling.token_group

    def stage(probs: Buffer, weighted: Buffer | None, of_head: OfHead, slot: Expr, num_groups: Expr) -> None:
        scales = of_head.values
        if weighted is None or scales is None:
            return
        region = probs[slot, 0:rows, 0 : tiling.padded_kv_tile]
        with T.sblock("weigh_values"):
            T.reads(region, whole(scales))
            T.writes(weighted[slot, 0:rows, 0 : tiling.padded_kv_tile])

            def value(row: Expr, t: Expr) -> Value:
                prob = probs[slot, row, t]
                product = prob * scales[t]
                if tiling.values.terms == 2 and not tiling.values.integers:
                    product = round_up_to_bfloat16(product)
                weight = T.Select(prob == T.float32(0), T.float32(0), product)
                return Value(weight, [prob, scales[t]])

            fill("weighted", weighted, value, num_groups, group, rows, slot)

    return stage


def weigh_factors(rows: int) -> Callable[..., None]:
    """weighted[slot, r] = factors.added[slot, r] times the scale of the head's values: what fold multiplies a tile by.

    The sblock weigh_factors, where a head or a cache has a scale. Or times units[slot, r], those of the weights, where
    integers are multiplied.
    """

    def stage(factors: Factors, weighted: Buffer | None, of_head: OfHead, units: Buffer | None = None) -> None:
        if weighted is None:
            return
        slot = factors.slot
        with T.sblock("weigh_factors"):
            T.reads(factors.added[slot, 0:rows], *([] if units is None else [units[slot, 0:rows]]))
            T.writes(weighted[slot, 0:rows])

            def value(row: Expr) -> Value:
                factor = factors.added[slot, row]
                scale = of_head.value if units is None else units[slot, row]
                product = T.Select(factor == T.float32(0), T.float32(0), factor * scale)
                return Value(product, [factor] if units is None else [factor, scale])

            fill("weighted_factor", weighted, value, rows=rows, slot=slot)

    return stage
