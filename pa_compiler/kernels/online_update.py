"""Stage 4: fold one partial result (acc, row_max, row_sum) into the running one.

The online softmax of M. Milakov and N. Gimelshein, Online normalizer calculation for softmax, 2018, section 3, for
whole tiles as in FlashAttention (T. Dao et al., 2022, algorithm 1). The same merge joins tiles, blocks and ranges.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.exp import store_exp
from pa_compiler.kernels.headroom import lifted
from pa_compiler.kernels.softmax_prepare import EMPTY_ROW_MAX
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


def online_update(rows: int, head_dim: int) -> Callable[..., None]:
    """Fold (tile_acc, tile_max, tile_sum)[tile_slot] into (acc, row_max, row_sum)[slot], as step `step` of num_steps.

    rescale and fold, one after the other. All of rows rows of head_dim elements.
    """
    rescale_stage, fold_stage = rescale(rows), fold(1, rows, head_dim)

    @inline
    def stage(tile_max, tile_sum, tile_acc, tile_slot, row_max, row_sum, acc, slot, step, num_steps):
        with T.sblock("online_update"):
            T.reads(
                tile_max[tile_slot, 0:rows],
                tile_sum[tile_slot, 0:rows],
                tile_acc[tile_slot, 0:rows, 0:head_dim],
                row_max[slot, 0:rows],
                row_sum[slot, 0:rows],
            )
            T.writes(row_max[slot, 0:rows], row_sum[slot, 0:rows], acc[slot, 0:rows, 0:head_dim])
            alpha = T.sblock_alloc_buffer((1, rows), "float32")
            beta = T.sblock_alloc_buffer((1, rows), "float32")
            rescale_stage(tile_max, tile_sum, tile_slot, row_max, row_sum, slot, alpha, beta, 0, step)
            with T.sblock("fold"):
                T.reads(tile_acc[tile_slot, 0:rows, 0:head_dim], alpha[0, 0:rows], beta[0, 0:rows])
                T.writes(acc[slot, 0:rows, 0:head_dim])
                fold_stage(tile_acc, tile_slot, alpha, beta, acc, slot, step, num_steps)

    return stage


def rescale(rows: int) -> Callable[..., None]:
    """Fold (tile_max, tile_sum)[tile_slot] into (row_max, row_sum)[slot]; alpha, beta[factor_slot] are what to fold by.

    With m = max(row_max, tile_max), alpha = exp(row_max - m) and beta = exp(tile_max - m):
    row_sum = alpha * row_sum + beta * tile_sum, row_max = m.
    Step 0 starts from the empty result. A result whose sum is 0 is empty and changes nothing, whatever its maximum: no
    stand-in for -inf is ever compared with a score.
    """

    @inline
    def stage(tile_max, tile_sum, tile_slot, row_max, row_sum, slot, alpha, beta, factor_slot, step):
        with T.sblock("rescale"):
            T.reads(
                tile_max[tile_slot, 0:rows], tile_sum[tile_slot, 0:rows], row_max[slot, 0:rows], row_sum[slot, 0:rows]
            )
            T.writes(
                row_max[slot, 0:rows], row_sum[slot, 0:rows], alpha[factor_slot, 0:rows], beta[factor_slot, 0:rows]
            )
            new_max = T.sblock_alloc_buffer((rows,), "float32")
            new_sum = T.sblock_alloc_buffer((rows,), "float32")
            for r in range(rows):
                with T.sblock("factors"):
                    vr = T.axis.spatial(rows, r)
                    old_max: T.let = T.Select(step == 0, T.float32(EMPTY_ROW_MAX), row_max[slot, vr])
                    old_sum: T.let = T.Select(step == 0, T.float32(0), row_sum[slot, vr])
                    both: T.let = T.max(old_max, tile_max[tile_slot, vr])
                    old_or_both: T.let = T.Select(tile_sum[tile_slot, vr] == T.float32(0), old_max, both)
                    m: T.let = T.Select(old_sum == T.float32(0), tile_max[tile_slot, vr], old_or_both)
                    new_max[vr] = m
                    store_exp(alpha, (factor_slot, vr), old_max - m, old_sum != T.float32(0))
                    store_exp(
                        beta, (factor_slot, vr), tile_max[tile_slot, vr] - m, tile_sum[tile_slot, vr] != T.float32(0)
                    )
            for r in range(rows):
                with T.sblock("new_sum"):
                    vr = T.axis.spatial(rows, r)
                    previous: T.let = T.Select(step == 0, T.float32(0), row_sum[slot, vr])
                    new_sum[vr] = alpha[factor_slot, vr] * previous + beta[factor_slot, vr] * tile_sum[tile_slot, vr]
            for r in range(rows):
                with T.sblock("row"):
                    vr = T.axis.spatial(rows, r)
                    row_max[slot, vr] = new_max[vr]
                    row_sum[slot, vr] = new_sum[vr]

    return stage


def fold(num_tiles: int, rows: int, head_dim: int) -> Callable[..., None]:
    """acc = alpha * acc + beta * tile_acc for num_tiles tiles, whose slots follow those given; in the caller's sblock.

    Step 0 of num_steps starts from 0.
    """

    @inline
    def stage(tile_acc, tile_slot, alpha, beta, acc, slot, step, num_steps):
        for i, r, d in T.grid(num_tiles, rows, head_dim):
            with T.sblock("acc"):
                vi, vr, vd = T.axis.remap("SSS", [i, r, d])
                vstep = T.axis.reduce(num_steps, step)
                with T.init():
                    acc[slot + vi, vr, vd] = T.float32(0)
                acc[slot + vi, vr, vd] = (
                    alpha[vi, vr] * acc[slot + vi, vr, vd] + beta[vi, vr] * tile_acc[tile_slot + vi, vr, vd]
                )

    return stage


def store_partial(rows: int, head_dim: int) -> Callable[..., None]:
    """Copy the first num_rows rows of (acc, row_max, row_sum)[slot] to the heads from head_start on of partial_slot."""

    @inline
    def stage(row_max, row_sum, acc, slot, partial_max, partial_sum, partial_acc, partial_slot, head_start, num_rows):
        with T.sblock("store_partial"):
            T.reads(row_max[slot, 0:rows], row_sum[slot, 0:rows], acc[slot, 0:rows, 0:head_dim])
            T.writes(
                partial_max[partial_slot, head_start : head_start + num_rows],
                partial_sum[partial_slot, head_start : head_start + num_rows],
                partial_acc[partial_slot, head_start : head_start + num_rows, 0:head_dim],
            )
            for r in range(num_rows):
                with T.sblock("store_row"):
                    vr = T.axis.spatial(rows, r)
                    partial_max[partial_slot, head_start + vr] = row_max[slot, vr]
                    partial_sum[partial_slot, head_start + vr] = row_sum[slot, vr]
            for r, d in T.grid(num_rows, head_dim):
                with T.sblock("store_acc"):
                    vr = T.axis.spatial(rows, r)
                    vd = T.axis.spatial(head_dim, d)
                    partial_acc[partial_slot, head_start + vr, vd] = acc[slot, vr, vd]

    return stage


def normalize(spec: PagedAttentionSpec, rows: int) -> Callable[..., None]:
    """out = acc / row_sum and lse = row_max + ln(row_sum) of the first num_rows rows, for the heads from head_start on.

    ln of row_sum without the sequence's headroom, which is in acc and row_sum. A row whose sum is 0 gives out = 0 and
    lse = -inf.
    """
    head_dim, out_dtype = spec.head_dim, spec.result_dtype

    @inline
    def stage(row_max, row_sum, acc, slot, out, lse, seq, head_start, num_rows, headroom):
        with T.sblock("normalize"):
            T.reads(row_max[slot, 0:rows], row_sum[slot, 0:rows], acc[slot, 0:rows, 0:head_dim])
            T.writes(
                out[seq, head_start : head_start + num_rows, 0:head_dim],
                lse[seq, head_start : head_start + num_rows],
            )
            factor = T.sblock_alloc_buffer((rows,), "float32")
            for r in range(rows):
                with T.sblock("factor"):
                    vr = T.axis.spatial(rows, r)
                    total: T.let = row_sum[slot, vr]
                    factor[vr] = T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)
            for r, d in T.grid(num_rows, head_dim):
                with T.sblock("out"):
                    vr = T.axis.spatial(rows, r)
                    vd = T.axis.spatial(head_dim, d)
                    out[seq, head_start + vr, vd] = T.Cast(out_dtype, acc[slot, vr, vd] * factor[vr])
            for r in range(num_rows):
                with T.sblock("lse"):
                    vr = T.axis.spatial(rows, r)
                    lse[seq, head_start + vr] = T.Select(
                        row_sum[slot, vr] == T.float32(0),
                        T.float32("-inf"),
                        row_max[slot, vr] + T.log(lifted(spec, row_sum[slot, vr], headroom)),
                    )

    return stage
