"""The arrays of a call as the PrimFuncs see them: their shapes, types and strides, each in one place.

A PrimFunc takes an array as a handle and matches a buffer to it here. The names of run-time extents and strides are
those of the host's arrays: batch, max_blocks, and `q_batch`, the elements from one sequence of query to the next.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer, PrimFunc, Var

from pa_compiler.score import BATCH, Constant, Input
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec
from pa_compiler.tiles import Element, Tiling


class BlockTable(NamedTuple):
    """Which blocks are a sequence's: block i is entries[seq, row_starts[seq] + i].

    A table has its rows in entries, and 0 in row_starts. Of a pair (indptr, indices) indptr is row_starts, and each row
    of entries is all of indices: the stride between rows is 0.
    """

    entries: Buffer
    row_starts: Buffer


class Arrays:
    """What match_buffer is given for each array of one PrimFunc; its arrays share their run-time extents."""

    def __init__(self, spec: PagedAttentionSpec, tiling: Tiling) -> None:
        self._spec, self._tiling = spec, tiling
        self._tokens = "num_tokens" if tiling.attends else "batch"
        self._vars: dict[str, Var] = {}

    def _var(self, name: str) -> Var:
        """A run-time extent or stride, int64; the same for the same name."""
        return self._vars.setdefault(name, Var(name, "int64"))

    def query(self, handle: Var) -> Buffer:
        """[batch or num_tokens, num_heads, head_dim], dtype; a head's elements lie side by side."""
        spec = self._spec
        return T.match_buffer(
            handle,
            (self._var(self._tokens), T.int64(spec.num_heads), T.int64(spec.head_dim)),
            spec.dtype,
            strides=[self._var("q_batch"), self._var("q_head"), T.int64(1)],
            align=ITEMSIZES[spec.dtype],
        )

    def key_cache(self, handle: Var) -> Buffer:
        """[k_span] words: the cache from its first element on. How long it is, offsets say, and k_span is not used."""
        return self._span(handle, "k_span", self._tiling.keys)

    def value_cache(self, handle: Var) -> Buffer:
        """[v_span] words, as key_cache."""
        return self._span(handle, "v_span", self._tiling.values)

    def _span(self, handle: Var, extent: str, element: Element) -> Buffer:
        return T.match_buffer(handle, (self._var(extent),), element.word_dtype, align=ITEMSIZES[element.dtype])

    def key_scale(self, handle: Var) -> Buffer:
        """[ks_span], float32: the scales of keys from the first on, as key_cache."""
        return T.match_buffer(handle, (self._var("ks_span"),), "float32", align=4)

    def value_scale(self, handle: Var) -> Buffer:
        """[vs_span], float32: the scales of values."""
        return T.match_buffer(handle, (self._var("vs_span"),), "float32", align=4)

    def block_table(self, handle: Var) -> Buffer:
        """[batch, max_blocks], int32: the entries of BlockTable."""
        shape = (self._var("batch"), self._var("max_blocks"))
        return T.match_buffer(handle, shape, "int32", strides=[self._var("table_seq"), T.int64(1)], align=4)

    def row_starts(self, handle: Var) -> Buffer:
        """[batch], int32: the row_starts of BlockTable."""
        return T.match_buffer(handle, (self._var("batch"),), "int32", strides=[self._var("row_step")], align=4)

    def context_lens(self, handle: Var) -> Buffer:
        """[batch], int32: tokens of each sequence."""
        return T.match_buffer(handle, (self._var("batch"),), "int32", align=4)

    def positions(self, handle: Var) -> Buffer:
        """[num_tokens], int32: where in its sequence each query token is."""
        return T.match_buffer(handle, (self._var(self._tokens),), "int32", align=4)

    def tree_mask(self, handle: Var) -> Buffer:
        """[tree_cells], uint8: which of a sequence's own query tokens each of them sees, sequence after sequence."""
        return T.match_buffer(handle, (self._var("tree_cells"),), "uint8", align=1)

    def partial_rows(self, handle: Var) -> Buffer:
        """[slots, num_heads], float32: row_max or row_sum of partial results."""
        return T.match_buffer(handle, (self._var("slots"), T.int64(self._spec.num_heads)), "float32", align=4)

    def partial_acc(self, handle: Var) -> Buffer:
        """[slots, num_heads, value_dim], float32: acc of partial results."""
        spec = self._spec
        shape = (self._var("slots"), T.int64(spec.num_heads), T.int64(spec.result_dim))
        return T.match_buffer(handle, shape, "float32", align=4)

    def outs(self, handle: Var, dtype: str) -> Buffer:
        """[parts, batch or num_tokens, num_heads, value_dim], dtype: results of parts of the keys."""
        spec = self._spec
        shape = (self._var("parts"), self._var(self._tokens), T.int64(spec.num_heads), T.int64(spec.result_dim))
        strides = [*map(self._var, ("outs_part", "outs_token", "outs_head")), T.int64(1)]
        return T.match_buffer(handle, shape, dtype, strides=strides, align=ITEMSIZES[dtype])

    def lses(self, handle: Var) -> Buffer:
        """[parts, batch or num_tokens, num_heads], float32: natural logarithms."""
        shape = (self._var("parts"), self._var(self._tokens), T.int64(self._spec.num_heads))
        strides = [self._var("lses_part"), self._var("lses_token"), T.int64(1)]
        return T.match_buffer(handle, shape, "float32", strides=strides, align=4)

    def out(self, handle: Var) -> Buffer:
        """[batch or num_tokens, num_heads, value_dim], out_dtype; a head's elements lie side by side."""
        spec = self._spec
        return T.match_buffer(
            handle,
            (self._var(self._tokens), T.int64(spec.num_heads), T.int64(spec.result_dim)),
            spec.result_dtype,
            strides=[self._var("out_batch"), self._var("out_head"), T.int64(1)],
            align=ITEMSIZES[spec.result_dtype],
        )

    def lse(self, handle: Var) -> Buffer:
        """[batch or num_tokens, num_heads], float32: natural logarithms."""
        shape = (self._var(self._tokens), T.int64(self._spec.num_heads))
        return T.match_buffer(handle, shape, "float32", strides=[self._var("lse_batch"), T.int64(1)], align=4)

    def alibi_slopes(self, handle: Var) -> Buffer:
        """[num_heads], float32."""
        return self._of_heads(handle, "slope_head")

    def of_functions(self, names: Collection[str]) -> dict[str, Buffer]:
        """Those of the inputs and constants that are named, in the spec's order, C-contiguous; bool as its bytes.

        They become further parameters of the PrimFunc that is being parsed: input_<name>, and constants by their names.
        """
        found = {}
        for parameter, array in function_arrays(self._spec).items():
            if array.name in names:
                handle = T.arg(f"{parameter}_handle", T.handle())
                shape = [self._var(each) if each == BATCH else T.int64(each) for each in array.shape or (1,)]
                dtype = "int8" if array.dtype == "bool" else array.dtype
                found[array.name] = T.match_buffer(
                    handle, shape, dtype, align=ITEMSIZES.get(array.dtype, 1 if array.dtype == "bool" else 4)
                )
                IRBuilder.name(parameter, found[array.name])
        return found

    def sinks(self, handle: Var) -> Buffer:
        """[num_heads], float32."""
        return self._of_heads(handle, "sink_head")

    def _of_heads(self, handle: Var, stride: str) -> Buffer:
        return T.match_buffer(handle, (T.int64(self._spec.num_heads),), "float32", strides=[self._var(stride)], align=4)

    def scores(self, handle: Var) -> Buffer:
        """[batch_chunk, row_tile, padded_kv_tile], float32: scores or probabilities of a chunk and a tile of tokens."""
        tiling = self._tiling
        return T.match_buffer(handle, (self._spec.batch_chunk, tiling.row_tile, tiling.padded_kv_tile), "float32")

    def rows(self, handle: Var) -> Buffer:
        """[batch_chunk, row_tile], float32: a maximum or a sum of each row of a chunk."""
        return T.match_buffer(handle, (self._spec.batch_chunk, self._tiling.row_tile), "float32")

    def acc(self, handle: Var) -> Buffer:
        """[batch_chunk, row_tile, value_dim], float32: outputs of each row of a chunk, not normalized."""
        shape = (self._spec.batch_chunk, self._tiling.row_tile, self._spec.result_dim)
        return T.match_buffer(handle, shape, "float32")


def function_arrays(spec: PagedAttentionSpec) -> dict[str, Input | Constant]:
    """The arrays that functions of scores may read, in the spec's order, by the names of kernels' parameters."""
    inputs: dict[str, Input | Constant] = {f"input_{each.name}": each for each in spec.inputs}
    return inputs | {each.name: each for each in spec.constants}


def without(function: PrimFunc, *names: str) -> PrimFunc:
    """A PrimFunc without the parameters that it does not use: arrays that are not matched, and those of these names."""
    params = [param for param in function.params if not param.name.endswith("_handle") and param.name not in names]
    return PrimFunc(params, function.body, function.ret_type, function.attrs)
