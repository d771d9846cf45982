"""merge_parts: out and lse of query tokens whose keys were attended to in parts, from out and lse of each part.

A softmax over the parts, whose scores are their lse: out = sum of exp(lse_p) * out_p over sum of exp(lse_p), as in
FlashDecoding and in section 2.2 of Cascade inference (FlashInfer). All lse are known before the first out is read, so
this is no online softmax: every part is weighed against the largest lse.
"""

import dataclasses

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels import state
from pa_compiler.kernels.arrays import Arrays
from pa_compiler.kernels.exp import store_exp
from pa_compiler.kernels.headroom import headroom
from pa_compiler.kernels.rows import Rows
from pa_compiler.kernels.state import State
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling


def merge_parts(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """The merge of results as the library gives them: out_dtype."""
    return _merge(spec, tiling, "merge_parts", spec.result_dtype)


def merge_float32_parts(spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    """The same of results in float32, where out_dtype is another."""
    return _merge(spec, tiling, "merge_float32_parts", "float32")


def _merge(spec: PagedAttentionSpec, tiling: Tiling, name: str, dtype: str) -> PrimFunc:
    """The PrimFunc name(outs, lses, out, lse, token, num_parts), of one query token with all heads.

    outs: [num_parts, num_tokens, num_heads, value_dim], dtype. lses: [num_parts, num_tokens, num_heads], float32,
    natural logarithms. num_parts is 1 at least. A part whose lse is -inf is empty and changes nothing, whatever its
    out; where all are, out is 0 and lse -inf. One that has all the weight comes out as it is, and with one lse of inf
    or several, those alone. NaN in another part comes out as NaN. Sinks are in the lse of the part that was given them.
    """
    arrays, heads, dim = Arrays(spec, tiling), spec.num_heads, spec.result_dim
    rotation = "none" if spec.has_scales else None  # of the parts, which are results
    normalize_stage = state.normalize(dataclasses.replace(spec, kv_rotation=rotation), heads)

    @script.prim_func(s_tir=True)
    def merge(
        outs_handle: T.handle,
        lses_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        token: T.int32,
        num_parts: T.int32,
    ):
        outs = arrays.outs(outs_handle, dtype)
        lses = arrays.lses(lses_handle)
        out = arrays.out(out_handle)
        lse = arrays.lse(lse_handle)
        with T.sblock("root"):
            row_max = T.sblock_alloc_buffer((1, heads), "float32")
            row_sum = T.sblock_alloc_buffer((1, heads), "float32")
            acc = T.sblock_alloc_buffer((1, heads, dim), "float32")
            weight = T.sblock_alloc_buffer((heads,), "float32")
            places: T.let = headroom(spec, num_parts)
            for part, r in T.grid(num_parts, heads):
                with T.sblock("largest_lse"):
                    vpart, vr = T.axis.remap("RS", [part, r])
                    with T.init():
                        row_max[0, vr] = T.float32("-inf")
                    row_max[0, vr] = T.max(row_max[0, vr], lses[vpart, token, vr])
            for part in range(num_parts):
                with T.sblock("part"):
                    T.reads()
                    T.writes()
                    step: T.let = T.axis.opaque(num_parts, part)
                    with T.sblock("weigh_part"):
                        for r in range(heads):
                            with T.sblock("weight"):
                                vr = T.axis.spatial(heads, r)
                                of_part: T.let = lses[step, token, vr]
                                below: T.let = T.Select(
                                    of_part == row_max[0, vr], T.float32(0), of_part - row_max[0, vr]
                                )
                                empty = T.meta_var(of_part == T.float32("-inf"))  # != is false of NaN
                                store_exp(
                                    weight, (vr,), T.Select(empty, T.float32("-inf"), below), T.bool(True), places
                                )
                        for r in range(heads):
                            with T.sblock("sum_of_weights"):
                                vr = T.axis.spatial(heads, r)
                                vstep = T.axis.reduce(num_parts, step)
                                with T.init():
                                    row_sum[0, vr] = T.float32(0)
                                row_sum[0, vr] = row_sum[0, vr] + weight[vr]
                    for r, d in T.grid(heads, dim):
                        with T.sblock("weighed_part"):
                            vr, vd = T.axis.remap("SS", [r, d])
                            vstep = T.axis.reduce(num_parts, step)
                            with T.init():
                                acc[0, vr, vd] = T.float32(0)
                            acc[0, vr, vd] = acc[0, vr, vd] + T.Select(
                                lses[vstep, token, vr] == T.float32("-inf"),
                                T.float32(0),
                                weight[vr] * T.Cast("float32", outs[vstep, token, vr, vd]),
                            )
            normalize_stage(State(row_max, row_sum, acc, 0), out, lse, Rows(token, 0, heads), places, None)

    return merge.with_attr("global_symbol", name)
