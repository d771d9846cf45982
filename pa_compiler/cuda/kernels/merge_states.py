"""merge_states on CUDA: out and lse of query tokens whose keys were attended to in parts, from those of each part.

As pa_compiler/kernels/merge_parts.py has it for CPUs: a softmax over the parts, whose scores are their lse.
"""

from __future__ import annotations

import dataclasses

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler.cuda.kernels.arrays import Arrays
from pa_compiler.cuda.kernels.state import EXP2, NEGATIVE_INFINITY, exponent, normalize
from pa_compiler.cuda.tiles import WARP, merge_threads
from pa_compiler.kernels.headroom import headroom
from pa_compiler.spec import PagedAttentionSpec


def cuda_merge_parts(spec: PagedAttentionSpec) -> PrimFunc:
    """The merge of results as the library gives them: out_dtype."""
    return _merge(spec, "cuda_merge_parts", spec.result_dtype)


def cuda_merge_float32_parts(spec: PagedAttentionSpec) -> PrimFunc:
    """The same of results in float32, where out_dtype is another."""
    return _merge(spec, "cuda_merge_float32_parts", "float32")


def _merge(spec: PagedAttentionSpec, name: str, dtype: str) -> PrimFunc:
    """Blocks [num_tokens * num_heads] of merge_threads threads: out and lse of one query token and query head.

    num_parts is 1 at least. A part whose lse is -inf is empty and changes nothing, whatever its out; where all are, out
    is 0 and lse -inf. With one lse of inf or several, those alone count. NaN in another part comes out as NaN. Sinks
    are in the lse of the part that was given them.
    """
    arrays, heads, threads = Arrays(spec), spec.num_heads, merge_threads(spec)
    normalize_stage = normalize(dataclasses.replace(spec, sinks=False))

    @T.prim_func
    def merge(
        outs_handle: T.handle,
        lses_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        outs_part: T.int64,
        outs_token: T.int64,
        outs_head: T.int64,
        lses_part: T.int64,
        lses_token: T.int64,
        out_batch: T.int64,
        out_head: T.int64,
        lse_batch: T.int64,
        num_parts: T.int32,
        num_tokens: T.int32,
    ):
        outs = arrays.outs(outs_handle, dtype)
        lses = arrays.lses(lses_handle)
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        T.device_entry()
        cta = T.cta_id([num_tokens * heads])
        warp_id = T.warp_id([threads // WARP])
        lane_id = T.lane_id([WARP])
        thread: T.int32 = warp_id * WARP + lane_id
        token: T.int64 = T.Cast("int64", T.truncdiv(cta, heads))
        head: T.int64 = T.Cast("int64", T.truncmod(cta, heads))
        if thread < spec.result_dim:
            d: T.int64 = T.Cast("int64", thread)
            highest: T.float32 = T.float32(NEGATIVE_INFINITY)
            for part in range(num_parts):
                highest = T.max(highest, lses[T.Cast("int64", part) * lses_part + token * lses_token + head])
            places: T.int32 = headroom(spec, num_parts)
            total: T.float32 = T.float32(0)
            value: T.float32 = T.float32(0)
            for part in range(num_parts):
                of_part: T.float32 = lses[T.Cast("int64", part) * lses_part + token * lses_token + head]
                is_empty = T.meta_var(of_part == T.float32(NEGATIVE_INFINITY))
                below = T.meta_var(T.Select(of_part == highest, T.float32(0), of_part - highest))
                weight: T.float32 = T.float32(0)
                T.ptx[EXP2](weight, exponent(spec, below, T.Cast("float32", places)))
                weight = T.Select(is_empty, T.float32(0), weight)
                total = total + weight
                at: T.let = T.Cast("int64", part) * outs_part + token * outs_token + head * outs_head + d
                value = value + T.Select(is_empty, T.float32(0), weight * T.Cast("float32", outs[at]))
            normalize_stage(
                highest, total, value, thread, places, out, token * out_batch + head * out_head + d,
                lse, token * lse_batch + head, None,
            )  # fmt: skip

    return merge.with_attr("global_symbol", name)
