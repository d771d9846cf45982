"""The end of a work item: a thread block's warps join their results, as one partial result or as out and lse."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer

from pa_compiler.cuda.kernels.scales import scale_sums
from pa_compiler.cuda.kernels.state import NEGATIVE_INFINITY, State, merge, normalize
from pa_compiler.cuda.tiles import CudaTiling
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


def warp_results(spec: PagedAttentionSpec, tiling: CudaTiling, ring: Buffer) -> State:
    """The states that warps leave, in the place of the rings: [warps, row_tile], and acc [warps, row_tile, acc_pitch].

    Of acc_pitch elements value_dim are used: the rows that a warp stores at once then begin in different banks.
    """
    count = tiling.warps * tiling.row_tile
    sizes = {"warp_max": count, "warp_sum": count, "warp_acc": count * tiling.acc_pitch(spec)}
    buffers = (
        T.decl_buffer((size,), "float32", data=ring.data, scope="shared.dyn", elem_offset=i * count)
        for i, size in enumerate(sizes.values())
    )
    return State(*(IRBuilder.name(name, buffer) for name, buffer in zip(sizes, buffers, strict=True)))


def join_warps(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """The results of all warps as one: the last of a work item, by all threads of its block.

    Where the sequence has one range, writes out and lse of the rows; otherwise their partial results, those of
    Arrays.partials for a range of num_tokens query tokens. Each thread takes an element of a row at a time.
    """
    value_dim, threads = spec.result_dim, tiling.threads
    merge_stage, normalize_stage = merge(T.unroll, tiling.acc_pitch(spec)), normalize(spec)
    scale_stage = scale_sums(spec, tiling)

    @inline
    def stage(results, thread, whole, first_slot, rows, headroom, scales, partials, out, out_batch, out_head, lse,
              lse_batch, sinks, sink_head):  # fmt: skip
        for step in range(T.truncdiv(rows.num * value_dim + (threads - 1), threads)):
            row: T.let = T.truncdiv(step * threads + thread, value_dim)
            d: T.let = T.truncmod(step * threads + thread, value_dim)
            if row < rows.num:
                highest: T.float32 = T.float32(NEGATIVE_INFINITY)
                total: T.float32 = T.float32(0)
                value: T.float32 = T.float32(0)
                merge_stage(results, row, tiling.row_tile, tiling.warps, d, highest, total, value)
                if spec.has_scales and not spec.token_scales:
                    scale_stage(scales, headroom, total, value)
                token: T.let = T.Cast("int64", rows.at(row)[0])
                head: T.let = T.Cast("int64", rows.at(row)[1])
                if whole:
                    normalize_stage(
                        highest, total, value, d, headroom, out,
                        token * out_batch + head * out_head + T.Cast("int64", d), lse, token * lse_batch + head,
                        sinks[head * sink_head] if spec.sinks else None,
                    )  # fmt: skip
                else:
                    slot: T.let = (first_slot + token) * T.int64(spec.num_heads) + head
                    partials.acc[slot * T.int64(value_dim) + T.Cast("int64", d)] = value
                    if d == 0:
                        partials.row_max[slot] = highest
                        partials.row_sum[slot] = total

    return stage
