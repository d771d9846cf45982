"""The last step of a query token whose keys several work items share: partial results are merged to out and lse."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels import state
from pa_compiler.kernels.arrays import Arrays, without
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.rows import Rows
from pa_compiler.kernels.state import State
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def merge_partials(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """out and lse of one query token, from num_partials partial results, of ranges of its keys in their order.

    out[token] = acc / row_sum and lse[token] = row_max + ln(row_sum), natural logarithm, for every head. A token that
    sees no key gives out = 0 and lse = -inf. num_partials is at least 1; merging one partial result is exact.

    They lie in the slots partial_start, partial_start + partial_step and so on; the first num_shared of them, of a
    prefix that sequences share, in shared_start, shared_start + shared_step and so on. num_keys is what the token may
    see: its position and one more, or, where it sees more than what is before it, all tokens of its sequence; of these
    a mask may leave fewer.
    """
    arrays, heads, dim = Arrays(spec, tiling), spec.num_heads, spec.result_dim
    merge_stage, normalize_stage = state.merge(heads, dim), state.normalize(spec, heads)

    @script.prim_func(s_tir=True)
    def merge_partials(
        partial_max_handle: T.handle,
        partial_sum_handle: T.handle,
        partial_acc_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        sinks_handle: T.handle,
        token: T.int32,
        num_keys: T.int32,
        partial_start: T.int32,
        partial_step: T.int32,
        num_partials: T.int32,
        shared_start: T.int32,
        shared_step: T.int32,
        num_shared: T.int32,
    ):
        partial_max = arrays.partial_rows(partial_max_handle)
        partial_sum = arrays.partial_rows(partial_sum_handle)
        partial_acc = arrays.partial_acc(partial_acc_handle)
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        if spec.sinks:
            sinks = arrays.sinks(sinks_handle)
        with T.sblock("root"):
            row_max = T.sblock_alloc_buffer((1, heads), "float32")
            row_sum = T.sblock_alloc_buffer((1, heads), "float32")
            acc = T.sblock_alloc_buffer((1, heads, dim), "float32")
            running = T.meta_var(State(row_max, row_sum, acc, 0))
            for step in range(num_partials):
                with T.sblock("partial"):
                    vstep = T.axis.opaque(num_partials, step)
                    T.reads()
                    T.writes()
                    own: T.let = partial_start + (vstep - num_shared) * partial_step
                    slot: T.let = T.Select(vstep < num_shared, shared_start + vstep * shared_step, own)
                    merge_stage(State(partial_max, partial_sum, partial_acc, slot), running, vstep, num_partials)
            places: T.let = headroom(spec, num_keys)
            normalize_stage(running, out, lse, Rows(token, 0, heads), places, sinks if spec.sinks else None)

    return without(merge_partials)
