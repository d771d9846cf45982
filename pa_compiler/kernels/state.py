"""State: a partial result of attention, and stage 4, which merges one into another and at last gives the result.

The online softmax of M. Milakov and N. Gimelshein, Online normalizer calculation for softmax, 2018, section 3, for
whole tiles as in FlashAttention (T. Dao et al., 2022, algorithm 1). The same merge joins tiles, blocks and ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from pa_compiler.kernels.exp import store_exp
from pa_compiler.kernels.headroom import lifted
from pa_compiler.kernels.rotation import rotated_back
from pa_compiler.kernels.rows import of_row
from pa_compiler.kernels.sinks import add_sinks_to
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

EMPTY_ROW_MAX = -1e30
"""row_max of the empty result. Only its row_sum, which is exactly 0, says that it is empty."""


class State(NamedTuple):
    """What is known of some rows after some of their tokens: attention before it is normalized.

    With scores s over these tokens: row_max = max s, row_sum = sum of exp(s - row_max), acc = sum of exp(s - row_max)
    times values. Where the sum is 0 the state is empty, whatever its maximum: no stand-in for -inf is ever compared
    with a score.

    Attributes:
        row_max, row_sum: [slots, rows], float32.
        acc: [slots, rows, value_dim], float32; None where it is only in registers.
        slot: Which of the slots.
        place: Where in acc an element of value_dim is; None: they are in order.
    """

    row_max: Buffer
    row_sum: Buffer
    acc: Buffer | None
    slot: Expr
    place: Callable[[Expr], Expr] | None = None

    def element(self, row: Expr, d: Expr) -> Expr:
        """An element of acc."""
        assert self.acc is not None
        return self.acc[self.slot, row, d if self.place is None else self.place(d)]

    def started(self, step: Expr, row: Expr) -> tuple[Expr, Expr]:
        """row_max and row_sum of a row before a step: before step 0, of the empty state, whatever memory holds."""
        return (
            T.Select(step == 0, T.float32(EMPTY_ROW_MAX), self.row_max[self.slot, row]),
            T.Select(step == 0, T.float32(0), self.row_sum[self.slot, row]),
        )


class Factors(NamedTuple):
    """What two states are multiplied by when they are merged: [slots, rows], float32, of which one slot.

    units: What sums of integers count, of each row; None: it is in `added`, or they are numbers.
    zeros: What every element of what is added lacks, of each row; None: nothing.
    """

    running: Buffer
    added: Buffer
    slot: Expr
    zeros: Buffer | None = None
    units: Buffer | None = None

    def completed(self, number: Expr, tile: Expr, row: Expr) -> Expr:
        """An element of what is added, with what it lacks."""
        if str(number.ty.dtype) == "int32":
            number = T.Cast("float32", number)
        if self.units is not None:
            number = number * self.units[tile, row]
        return number if self.zeros is None else number + self.zeros[tile, row]


def merge(rows: int, dim: int, of: str = "") -> Callable[..., None]:
    """The sblock online_update: add the state `added` to the state `running`, as step `step` of num_steps.

    rescale and fold, one after the other. All of rows rows of dim elements. `of` comes before the names of the sblocks
    in it, for kernels that merge twice.
    """
    rescale_stage, fold_stage = rescale(rows, of), fold(1, rows, dim, of)

    @inline
    def stage(added, running, step, num_steps):
        with T.sblock("online_update"):
            T.reads(
                added.row_max[added.slot, 0:rows],
                added.row_sum[added.slot, 0:rows],
                added.acc[added.slot, 0:rows, 0:dim],
                running.row_max[running.slot, 0:rows],
                running.row_sum[running.slot, 0:rows],
            )
            T.writes(
                running.row_max[running.slot, 0:rows],
                running.row_sum[running.slot, 0:rows],
                running.acc[running.slot, 0:rows, 0:dim],
            )
            alpha = T.sblock_alloc_buffer((1, rows), "float32")
            beta = T.sblock_alloc_buffer((1, rows), "float32")
            factors = T.meta_var(Factors(alpha, beta, 0))
            rescale_stage(added, running, factors, step)
            with T.sblock(f"{of}fold"):
                T.reads(added.acc[added.slot, 0:rows, 0:dim], alpha[0, 0:rows], beta[0, 0:rows])
                T.writes(running.acc[running.slot, 0:rows, 0:dim])
                fold_stage(added.acc, added.slot, factors, running.acc, running.slot, step, num_steps)

    return stage


def rescale(rows: int, of: str = "") -> Callable[..., None]:
    """Merge the maxima and sums of the state `added` into those of `running`, and write to factors what fold takes.

    With m = max(row_max of both), alpha = exp(running.row_max - m) and beta = exp(added.row_max - m):
    row_sum = alpha * running.row_sum + beta * added.row_sum, row_max = m. Step 0 starts from the empty state. A state
    whose sum is 0 changes nothing.
    """

    @inline
    def stage(added, running, factors, step):
        tile_slot = T.meta_var(added.slot)
        tile_max = T.meta_var(added.row_max)
        tile_sum = T.meta_var(added.row_sum)
        slot = T.meta_var(running.slot)
        row_max = T.meta_var(running.row_max)
        row_sum = T.meta_var(running.row_sum)
        alpha = T.meta_var(factors.running)
        beta = T.meta_var(factors.added)
        at = T.meta_var(factors.slot)
        with T.sblock(f"{of}rescale"):
            T.reads(
                tile_max[tile_slot, 0:rows], tile_sum[tile_slot, 0:rows], row_max[slot, 0:rows], row_sum[slot, 0:rows]
            )
            T.writes(row_max[slot, 0:rows], row_sum[slot, 0:rows], alpha[at, 0:rows], beta[at, 0:rows])
            new_max = T.sblock_alloc_buffer((rows,), "float32")
            new_sum = T.sblock_alloc_buffer((rows,), "float32")
            for r in range(rows):
                with T.sblock(f"{of}factors"):
                    vr = T.axis.spatial(rows, r)
                    old_max: T.let = running.started(step, vr)[0]
                    old_sum: T.let = running.started(step, vr)[1]
                    both: T.let = T.max(old_max, tile_max[tile_slot, vr])
                    old_or_both: T.let = T.Select(tile_sum[tile_slot, vr] == T.float32(0), old_max, both)
                    m: T.let = T.Select(old_sum == T.float32(0), tile_max[tile_slot, vr], old_or_both)
                    new_max[vr] = m
                    store_exp(alpha, (at, vr), old_max - m, old_sum != T.float32(0))
                    store_exp(beta, (at, vr), tile_max[tile_slot, vr] - m, tile_sum[tile_slot, vr] != T.float32(0))
            for r in range(rows):
                with T.sblock(f"{of}new_sum"):
                    vr = T.axis.spatial(rows, r)
                    previous: T.let = running.started(step, vr)[1]
                    new_sum[vr] = alpha[at, vr] * previous + beta[at, vr] * tile_sum[tile_slot, vr]
            for r in range(rows):
                with T.sblock(f"{of}row"):
                    vr = T.axis.spatial(rows, r)
                    row_max[slot, vr] = new_max[vr]
                    row_sum[slot, vr] = new_sum[vr]

    return stage


def fold(num_tiles: int, rows: int, dim: int, of: str = "") -> Callable[..., None]:
    """acc = alpha * acc + beta * tile_acc for num_tiles tiles, whose slots follow those given; in the caller's sblock.

    Step 0 of num_steps starts from 0. factors are from slot 0 on.
    """

    @inline
    def stage(tile_acc, tile_slot, factors, acc, slot, step, num_steps):
        for i, r, d in T.grid(num_tiles, rows, dim):
            with T.sblock(f"{of}acc"):
                vi, vr, vd = T.axis.remap("SSS", [i, r, d])
                vstep = T.axis.reduce(num_steps, step)
                with T.init():
                    acc[slot + vi, vr, vd] = T.float32(0)
                acc[slot + vi, vr, vd] = factors.running[vi, vr] * acc[slot + vi, vr, vd] + factors.added[
                    vi, vr
                ] * factors.completed(tile_acc[tile_slot + vi, vr, vd], vi, vr)

    return stage


def store(capacity: int, dim: int) -> Callable[..., None]:
    """Copy the rows that there are of a state of `capacity` rows into a state that has a row for every head."""

    @inline
    def stage(state, partial, rows):
        slot = T.meta_var(state.slot)
        of = T.meta_var(rows.of_partial(partial.slot))
        with T.sblock("store_partial"):
            T.reads(
                state.row_max[slot, 0:capacity], state.row_sum[slot, 0:capacity], state.acc[slot, 0:capacity, 0:dim]
            )
            T.writes(
                partial.row_max[of.all()],
                partial.row_sum[of.all()],
                partial.acc[of.all(slice(0, dim))],
            )
            for r in range(rows.num):
                with T.sblock("store_row"):
                    vr = T.axis.spatial(capacity, r)
                    partial.row_max[of.at(vr)] = state.row_max[slot, vr]
                    partial.row_sum[of.at(vr)] = state.row_sum[slot, vr]
            for r, d in T.grid(rows.num, dim):
                with T.sblock("store_acc"):
                    vr = T.axis.spatial(capacity, r)
                    vd = T.axis.spatial(dim, d)
                    partial.acc[of.at(vr, vd)] = state.element(vr, vd)

    return stage


def normalize(spec: PagedAttentionSpec, capacity: int, many_tokens: bool = False) -> Callable[..., None]:
    """out = acc / row_sum and lse = row_max + ln(row_sum) of the rows that there are of a state of `capacity` rows.

    ln of row_sum without the sequence's headroom, which is in acc and row_sum. A row whose sum is 0 gives out = 0 and
    lse = -inf. With many_tokens all rows are normalized, those that pad the tile too, before those that there are are
    copied: in vectors whatever their number. Where sinks are given, the sum has exp(sink - row_max) besides, which has
    no value; a sink of -inf is none. Where values are rotated before they become codes, acc is rotated back.
    """
    dim, out_dtype, add_sinks = spec.result_dim, spec.result_dtype, add_sinks_to(capacity)

    @inline
    def stage(state, out, lse, rows, headroom, sinks):
        slot = T.meta_var(state.slot)
        with T.sblock("normalize"):
            T.reads(
                state.row_max[slot, 0:capacity],
                state.row_sum[slot, 0:capacity],
                state.acc[slot, 0:capacity, 0:dim],
                *([] if sinks is None else [sinks[0 : spec.num_heads]]),
            )
            T.writes(out[rows.all(slice(0, dim))], lse[rows.all()])
            factor = T.sblock_alloc_buffer((capacity,), "float32")
            if sinks is not None:
                peak = T.sblock_alloc_buffer((capacity,), "float32")
                total_sum = T.sblock_alloc_buffer((capacity,), "float32")
                add_sinks(state, sinks, rows, headroom, peak, total_sum, factor)
            else:
                for r in range(capacity):
                    with T.sblock("factor"):
                        vr = T.axis.spatial(capacity, r)
                        total: T.let = state.row_sum[slot, vr]
                        factor[vr] = T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)
            total_of = T.meta_var(rotated_back(spec, state.element, capacity))
            maxima = T.meta_var(state.row_max if sinks is None else peak)
            sums = T.meta_var(state.row_sum if sinks is None else total_sum)
            if many_tokens:
                ordered = T.sblock_alloc_buffer((capacity, dim), "float32")
                for r, d in T.grid(capacity, dim):
                    with T.sblock("ordered"):
                        vr, vd = T.axis.remap("SS", [r, d])
                        ordered[vr, vd] = total_of(vr, vd) * factor[vr]
            for r, d in T.grid(rows.num, dim):
                with T.sblock("out"):
                    vr = T.axis.spatial(capacity, r)
                    vd = T.axis.spatial(dim, d)
                    out[rows.at(vr, vd)] = T.Cast(
                        out_dtype,
                        ordered[vr, vd] if many_tokens else total_of(vr, vd) * factor[vr],
                    )
            for r in range(rows.num):
                with T.sblock("lse"):
                    vr = T.axis.spatial(capacity, r)
                    place = T.meta_var((slot, vr) if sinks is None else (vr,))
                    lse[rows.at(vr)] = T.Select(
                        sums[place] == T.float32(0),
                        T.float32("-inf"),
                        maxima[place] + T.log(lifted(spec, sums[place], of_row(headroom, vr))),
                    )

    return stage
