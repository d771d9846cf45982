"""The arrays of a call as the CUDA kernels see them: each with its name, its type and its shape, in one place.

To a kernel an array is a span of memory from its first element on: strides are parameters too, in elements, and the
last axis is contiguous. The shapes here are those of the user's arrays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer, Var

from pa_compiler.cuda.kernels.state import State
from pa_compiler.kernels.arrays import function_arrays
from pa_compiler.score import BATCH
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec


class Cache(NamedTuple):
    """A cache as the threads of one kv head see it.

    Attributes:
        memory: Arrays.key_cache or Arrays.value_cache.
        block: Elements from a block to the next, int64.
        row: Elements from a slot of a block to the next, int64.
        head: Elements from a slot to the kv head's part of it, int64.
    """

    memory: Buffer
    block: Expr
    row: Expr
    head: Expr


class Arrays:
    """Matches the handles that a kernel takes for its arrays."""

    def __init__(self, spec: PagedAttentionSpec) -> None:
        self._spec = spec
        self._kept = "uint8" if spec.has_scales else spec.dtype  # codes are bytes

    def query(self, handle: Var) -> Buffer:
        """[num_tokens, num_heads, head_dim], dtype; strides q_batch, q_head. Rows are aligned to 4 bytes.

        In decode a token for each sequence: num_tokens is batch.
        """
        return _span("query", handle, self._spec.dtype)

    def key_cache(self, handle: Var) -> Buffer:
        """[num_blocks, block_size, num_kv_heads, head_dim], dtype or bytes of codes, or in HND heads before slots.

        Strides k_block, k_row of a slot, k_head. Rows are aligned to 16 bytes.
        """
        return _span("key_cache", handle, self._kept)

    def value_cache(self, handle: Var) -> Buffer:
        """[num_blocks, block_size, num_kv_heads, value_dim], otherwise as key_cache; strides v_block, v_row, v_head.

        With shared_kv no kernel reads it, and what no kernel reads is no parameter of what is emitted.
        """
        return _span("value_cache", handle, self._kept)

    def scales(self, key_handle: Var, value_handle: Var) -> tuple[Buffer, ...]:
        """Of keys and of values [1], [num_kv_heads] or [num_blocks, num_kv_heads, block_size], float32.

        Strides ks_block, ks_row, ks_head and vs_block, vs_row, vs_head, 0 where there is no such axis. None of either
        where the caches hold dtype.
        """
        handles = {"key_scale": key_handle, "value_scale": value_handle} if self._spec.has_scales else {}
        return tuple(_span(name, handle, "float32") for name, handle in handles.items())

    def block_table(self, handle: Var) -> Buffer:
        """[batch, max_blocks], int32; stride table_seq. Of a pair (indptr, indices) indices, with stride 0."""
        return _span("block_table", handle, "int32")

    def row_starts(self, handle: Var) -> Buffer:
        """[batch + 1], int32: where in its row of block_table a sequence's blocks begin, and those of the next.

        Of a pair indptr, with stride row_step 1; else one 0, with stride 0.
        """
        return _span("row_starts", handle, "int32")

    def context_lens(self, handle: Var) -> Buffer:
        """[batch], int32: tokens of each sequence."""
        return _span("context_lens", handle, "int32")

    def query_start_loc(self, handle: Var) -> Buffer:
        """[batch + 1], int32: where each sequence's query tokens begin, and those of the next."""
        return _span("query_start_loc", handle, "int32")

    def tree_mask(self, handle: Var) -> Buffer:
        """[sum of n * n], uint8: of each sequence's n query tokens, which of them each one sees."""
        return _span("tree_mask", handle, "uint8")

    def partials(self, max_handle: Var, sum_handle: Var, acc_handle: Var) -> State:
        """row_max and row_sum [ranges, num_tokens, num_heads], acc [ranges, num_tokens, num_heads, value_dim].

        Contiguous. Of each range of a query token's sequence, where it has several; num_tokens are those of the call,
        in decode batch.
        """
        handles = {"partial_max": max_handle, "partial_sum": sum_handle, "partial_acc": acc_handle}
        return State(*(_span(name, handle, "float32") for name, handle in handles.items()))

    def out(self, handle: Var) -> Buffer:
        """[num_tokens, num_heads, value_dim], result_dtype; strides out_batch, out_head."""
        return _span("out", handle, self._spec.result_dtype)

    def lse(self, handle: Var) -> Buffer:
        """[num_tokens, num_heads], float32; stride lse_batch."""
        return _span("lse", handle, "float32")

    def outs(self, handle: Var, dtype: str) -> Buffer:
        """[parts, num_tokens, num_heads, value_dim], dtype; strides outs_part, outs_token, outs_head."""
        return _span("outs", handle, dtype)

    def lses(self, handle: Var) -> Buffer:
        """[parts, num_tokens, num_heads], float32; strides lses_part, lses_token."""
        return _span("lses", handle, "float32")

    def alibi_slopes(self, handle: Var) -> Buffer:
        """[num_heads], float32; stride slope_head."""
        return _span("alibi_slopes", handle, "float32")

    def sinks(self, handle: Var) -> Buffer:
        """[num_heads], float32; stride sink_head."""
        return _span("sinks", handle, "float32")

    def of_functions(self, names: Collection[str], batch: Var) -> dict[str, Buffer]:
        """The inputs and constants that are named, by name: C-contiguous, of the spec's shapes; bool as its bytes.

        They become further parameters of the PrimFunc that is being parsed, as in kernels/arrays.py. batch is the
        kernel's parameter, int32.
        """
        found = {}
        for parameter, array in function_arrays(self._spec).items():
            if array.name in names:
                shape = [batch if extent == BATCH else T.int32(extent) for extent in array.shape or (1,)]
                handle = T.arg(f"{parameter}_handle", T.handle())
                dtype = "int8" if array.dtype == "bool" else array.dtype
                found[array.name] = IRBuilder.name(parameter, T.match_buffer(handle, shape, dtype))
        return found

    def bits(self, name: str, handle: Var) -> Buffer:
        """key, value, key_cache or value_cache of append_kv: elements, and codes, as unsigned integers of their width.

        key [num_tokens, num_kv_heads, head_dim], strides key_token, key_head; value [num_tokens, num_kv_heads,
        value_dim], strides value_token, value_head; the caches as above. All rows are aligned to 16 bytes.
        """
        dtype = self._spec.cache_dtype if name.endswith("cache") else self._spec.dtype
        return _span(name, handle, f"uint{8 * ITEMSIZES[dtype]}")

    def slot_mapping(self, handle: Var) -> Buffer:
        """[num_tokens], int64: block * block_size + slot, or a negative number for a token that is skipped."""
        return _span("slot_mapping", handle, "int64")

    def status(self, handle: Var) -> Buffer:
        """[1], int32: 0, or what a kernel has found wrong with the indices of the call (check.py)."""
        return _span("status", handle, "int32")

    def report(self, handle: Var) -> Buffer:
        """[fields of a report], int64, in memory that the host sees (check.py)."""
        return _span("report", handle, "int64")


def _span(name: str, handle: Var, dtype: str) -> Buffer:
    return IRBuilder.name(name, T.match_buffer(handle, (Var(f"{name}_span", "int64"),), dtype))
