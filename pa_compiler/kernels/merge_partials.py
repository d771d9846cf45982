"""The last step of a sequence that several work items share: merge its partial results and write out and lse."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.online_update import normalize, online_update
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import Tiling


def merge_partials(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """out and lse of one sequence, from its partial results in slots [partial_start, partial_start + num_partials).

    out[seq] = acc / row_sum and lse[seq] = row_max + ln(row_sum), natural logarithm, for every head. An empty sequence
    gives out = 0 and lse = -inf. num_partials is at least 1; merging one partial result is exact.
    """
    heads, head_dim = T.int64(spec.num_heads), T.int64(spec.head_dim)
    num_heads, out_dtype = spec.num_heads, spec.result_dtype
    itemsize = ITEMSIZES[out_dtype]
    update_stage = online_update(num_heads, spec.head_dim)
    normalize_stage = normalize(spec, num_heads)

    @script.prim_func(s_tir=True)
    def merge_partials(
        context_lens_handle: T.handle,
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        seq: T.int32,
        partial_start: T.int32,
        num_partials: T.int32,
    ):
        batch, slots = T.int64(), T.int64()
        out_batch, out_head, lse_batch = T.int64(), T.int64(), T.int64()
        context_lens = T.match_buffer(context_lens_handle, (batch,), "int32", align=4)
        partial_max = T.match_buffer(partial_max_handle, (slots, heads), "float32", align=4)
        partial_sum = T.match_buffer(partial_sum_handle, (slots, heads), "float32", align=4)
        partial_acc = T.match_buffer(partial_acc_handle, (slots, heads, head_dim), "float32", align=4)
        out = T.match_buffer(
            out_handle, (batch, heads, head_dim), out_dtype, strides=[out_batch, out_head, T.int64(1)], align=itemsize,

        )  # fmt: skip
        lse = T.match_buffer(lse_handle, (batch, heads), "float32", strides=[lse_batch, T.int64(1)], align=4)
        with T.sblock("root"):
            row_max = T.sblock_alloc_buffer((1, num_heads), "float32")
            row_sum = T.sblock_alloc_buffer((1, num_heads), "float32")
            acc = T.sblock_alloc_buffer((1, num_heads, spec.head_dim), "float32")
            for step in range(num_partials):
                with T.sblock("partial"):
                    vstep = T.axis.opaque(num_partials, step)
                    T.reads()
                    T.writes()
                    slot: T.let = partial_start + vstep
                    update_stage(
                        partial_max, partial_sum, partial_acc, slot, row_max, row_sum, acc, 0, vstep, num_partials
                    )
            places: T.let = headroom(spec, context_lens[seq])
            normalize_stage(row_max, row_sum, acc, 0, out, lse, seq, 0, num_heads, places)

    return merge_partials
