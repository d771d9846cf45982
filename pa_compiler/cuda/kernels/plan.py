"""Which range of which sequence a work item is: found on the GPU from context_lens, so that every launch is the same.

With `total` steps (of tiling.step_tokens tokens) in all sequences and `extra` more work items than sequences, a range
has up to total / extra steps. Sequence b is cut into ceil(steps_b / range) equal ranges, at least one, and since
sum_b max(1, ceil(steps_b / range)) <= batch + total / range, batch + extra items are enough for any lengths. Items are
numbered sequence after sequence. Every warp finds its own, from the same integers: no kernel leaves a plan for another.

A sequence has the tokens from the first that is seen to the last: its ranges begin there, in the midst of a block.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.tiles import WARP, CudaTiling
from pa_compiler.kernels.rows import first_seen, limit
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

ALL_LANES = 0xFFFFFFFF


def range_length(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """range_steps[0] = steps of a range, for these context_lens."""
    step, shortest = tiling.step_tokens, tiling.min_range_steps

    @inline
    def stage(context_lens, batch, extra, lane, range_steps):
        steps: T.uint32 = T.uint32(0)
        for i in range(T.truncdiv(batch + (WARP - 1), WARP)):
            if i * WARP + lane < batch:
                steps = steps + T.Cast("uint32", _steps(spec, context_lens[i * WARP + lane], step))
        total: T.let = T.cuda.reduce_add_sync_u32(T.uint32(ALL_LANES), steps)
        range_steps[0] = T.max(
            T.Cast("int32", T.truncdiv(total + T.Cast("uint32", extra - 1), T.Cast("uint32", extra))), shortest
        )

    return stage


def find_item(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """found = [sequence, first token, one past the last token, ranges of the sequence, its length], int32, of an item.

    The sequence is -1 if there are fewer items. Warp-wide: all lanes of a warp call it and get the same.
    """
    step = tiling.step_tokens
    range_length_stage = range_length(spec, tiling)

    @inline
    def stage(context_lens, batch, extra, item, lane, found):
        range_steps = T.alloc_buffer((1,), "int32", scope="local")
        range_length_stage(context_lens, batch, extra, lane, range_steps)
        found[0] = -1
        before: T.int32 = 0  # items of the sequences before these 32
        first: T.int32 = 0
        while (found[0] < 0) & (first < batch):
            steps: T.int32 = 0
            ranges: T.int32 = 0
            if first + lane < batch:
                steps = _steps(spec, context_lens[first + lane], step)
                ranges = _ranges(steps, range_steps[0])
            end: T.int32 = ranges
            for level in T.unroll(5):
                below: T.let = T.cuda.__shfl_up_sync(T.uint32(ALL_LANES), end, 1 << level, WARP)
                end = T.Select(lane >= (1 << level), end + below, end)
            hits: T.let = T.cuda.ballot_sync(T.uint32(ALL_LANES), T.Cast("int32", before + end > item))
            if hits != T.uint32(0):
                owner: T.let = T.cuda.ffs_u32(hits) - 1
                number: T.let = T.cuda.__shfl_sync(T.uint32(ALL_LANES), item - before - end + ranges, owner, WARP)
                owned: T.let = T.cuda.__shfl_sync(T.uint32(ALL_LANES), ranges, owner, WARP)
                owned_steps: T.let = T.cuda.__shfl_sync(T.uint32(ALL_LANES), steps, owner, WARP)
                length: T.let = T.truncdiv(owned_steps + owned - 1, owned)
                found[0] = first + owner
                found[1] = first_seen(spec, context_lens[first + owner]) + number * length * step
                found[4] = context_lens[first + owner]
                found[2] = T.min(limit(spec, found[4]), first_seen(spec, found[4]) + (number + 1) * length * step)
                found[3] = owned
            before = before + T.cuda.__shfl_sync(T.uint32(ALL_LANES), end, WARP - 1, WARP)
            first = first + WARP

    return stage


def find_partials(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """found = [first work item, work items] of a sequence, int32. Warp-wide."""
    step = tiling.step_tokens
    range_length_stage = range_length(spec, tiling)

    @inline
    def stage(context_lens, batch, extra, seq, lane, found):
        range_steps = T.alloc_buffer((1,), "int32", scope="local")
        range_length_stage(context_lens, batch, extra, lane, range_steps)
        before: T.uint32 = T.uint32(0)
        for i in range(T.truncdiv(seq + (WARP - 1), WARP)):
            if i * WARP + lane < seq:
                steps = T.meta_var(_steps(spec, context_lens[i * WARP + lane], step))
                before = before + T.Cast("uint32", _ranges(steps, range_steps[0]))
        found[0] = T.Cast("int32", T.cuda.reduce_add_sync_u32(T.uint32(ALL_LANES), before))
        found[1] = _ranges(_steps(spec, context_lens[seq], step), range_steps[0])

    return stage


def _steps(spec: PagedAttentionSpec, length: Expr, step: int) -> Expr:
    """Steps of a sequence: from the first key that is seen to the last."""
    return T.truncdiv(T.max(limit(spec, length) - first_seen(spec, length), 0) + (step - 1), step)


def _ranges(steps: Expr, range_steps: Expr) -> Expr:
    """Equal ranges of at most range_steps that a sequence is cut into; 1 for an empty one."""
    return T.max(T.truncdiv(steps + range_steps - 1, range_steps), 1)
