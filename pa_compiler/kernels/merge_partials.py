"""The last step of both pipelines: merge the partial results of a sequence and write out and lse."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.kernels.online_update import online_update
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiling import Tiling


def merge_partials(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """out and lse of num_rows heads of one sequence, from its partial results in slots [partial_start, +num_partials).

    out[seq, head_start + r, :] = acc / row_sum and lse[seq, head_start + r] = row_max + ln(row_sum), natural logarithm.
    An empty sequence gives out = 0 and lse = -inf. num_partials is at least 1; merging one partial result is exact.
    """
    heads, head_dim, rows = T.int64(spec.num_heads), T.int64(spec.head_dim), tiling.row_tile
    out_dtype = spec.out_dtype or spec.dtype
    itemsize = ITEMSIZES[out_dtype]
    update_stage = online_update(spec, tiling)

    @T.prim_func(s_tir=True)
    def merge_partials(
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        seq: T.int32,
        head_start: T.int32,
        num_rows: T.int32,
        partial_start: T.int32,
        num_partials: T.int32,
    ):
        batch, slots = T.int64(), T.int64()
        out_batch, out_head, lse_batch = T.int64(), T.int64(), T.int64()
        partial_max = T.match_buffer(partial_max_handle, (slots, T.int64(rows)), "float32")
        partial_sum = T.match_buffer(partial_sum_handle, (slots, T.int64(rows)), "float32")
        partial_acc = T.match_buffer(partial_acc_handle, (slots, head_dim, T.int64(rows)), "float32")
        out = T.match_buffer(
            out_handle, (batch, heads, head_dim), out_dtype, strides=[out_batch, out_head, T.int64(1)], align=itemsize,

        )  # fmt: skip
        lse = T.match_buffer(lse_handle, (batch, heads), "float32", strides=[lse_batch, T.int64(1)], align=4)
        with T.sblock("root"):
            row_max = T.sblock_alloc_buffer((1, rows), "float32")
            row_sum = T.sblock_alloc_buffer((1, rows), "float32")
            acc = T.sblock_alloc_buffer((1, spec.head_dim, rows), "float32")
            normalized = T.sblock_alloc_buffer((spec.head_dim, rows), "float32")
            for step in range(num_partials):
                with T.sblock("partial"):
                    vstep = T.axis.opaque(num_partials, step)
                    T.reads()
                    T.writes()
                    slot: T.let = partial_start + vstep
                    update_stage(
                        partial_max, partial_sum, partial_acc, slot, row_max, row_sum, acc, 0, vstep, num_partials
                    )
            for d, r in T.grid(spec.head_dim, rows):
                with T.sblock("normalize"):
                    vd, vr = T.axis.remap("SS", [d, r])
                    normalized[vd, vr] = T.Select(
                        row_sum[0, vr] == T.float32(0), T.float32(0), acc[0, vd, vr] / row_sum[0, vr]
                    )
            for r, d in T.grid(num_rows, spec.head_dim):
                with T.sblock("out"):
                    vr = T.axis.spatial(num_rows, r)
                    vd = T.axis.spatial(spec.head_dim, d)
                    out[seq, head_start + vr, vd] = T.Cast(out_dtype, normalized[vd, vr])
            for r in range(num_rows):
                with T.sblock("lse"):
                    vr = T.axis.spatial(num_rows, r)
                    lse[seq, head_start + vr] = T.Select(
                        row_sum[0, vr] == T.float32(0), T.float32("-inf"), row_max[0, vr] + T.log(row_sum[0, vr])
                    )

    return merge_partials
