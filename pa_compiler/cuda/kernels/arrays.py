"""The arrays that kernels take, each matched in one place, with its name, its element type and its shape.

The shapes are those of the user's arrays. To a kernel an array is a span of memory from its first element on, since
strides are parameters too, in elements; the last axis is contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Buffer, Var

from pa_compiler.cuda.kernels.state import State
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec


class PagedCache(NamedTuple):
    """A cache as the threads of one kv head see it.

    Attributes:
        memory: What match_key_cache or match_value_cache gives.
        block: Elements from a block to the next, int64.
        row: Elements from a slot of a block to the next, int64.
        head: Elements from a slot to the kv head's part of it, int64.
    """

    memory: Buffer
    block: Expr
    row: Expr
    head: Expr


def match_query(spec: PagedAttentionSpec, handle: Var) -> Buffer:
    """query [batch, num_heads, head_dim]; strides q_batch, q_head. Rows are aligned to 4 bytes."""
    return _match("query", handle, spec.dtype)


def match_key_cache(spec: PagedAttentionSpec, handle: Var) -> Buffer:
    """key_cache [num_blocks, block_size, num_kv_heads, head_dim] in NHD; strides k_block, k_row, k_head.

    In every layout a row is a token. Rows are aligned to 16 bytes.
    """
    return _match("key_cache", handle, spec.dtype)


def match_value_cache(spec: PagedAttentionSpec, handle: Var) -> Buffer:
    """value_cache [num_blocks, block_size, num_kv_heads, value_dim]; strides v_block, v_row, v_head; as key_cache.

    With shared_kv no kernel reads it.
    """
    return _match("value_cache", handle, spec.dtype)


def match_block_table(handle: Var) -> Buffer:
    """block_table [batch, max_blocks], int32; stride table_seq."""
    return _match("block_table", handle, "int32")


def match_context_lens(handle: Var) -> Buffer:
    """context_lens [batch], int32, tokens."""
    return _match("context_lens", handle, "int32")


def match_partials(max_handle: Var, sum_handle: Var, acc_handle: Var) -> State:
    """partial_max and partial_sum [items, num_heads], partial_acc [items, num_heads, value_dim], contiguous."""
    handles = {"partial_max": max_handle, "partial_sum": sum_handle, "partial_acc": acc_handle}
    return State(*(_match(name, handle, "float32") for name, handle in handles.items()))


def match_out(spec: PagedAttentionSpec, handle: Var) -> Buffer:
    """out [batch, num_heads, value_dim] of result_dtype; strides out_batch, out_head."""
    return _match("out", handle, spec.result_dtype)


def match_lse(handle: Var) -> Buffer:
    """lse [batch, num_heads], float32; stride lse_batch."""
    return _match("lse", handle, "float32")


def match_bits(spec: PagedAttentionSpec, name: str, handle: Var) -> Buffer:
    """key, value, key_cache or value_cache of append_kv: elements as unsigned integers of their width.

    key [num_tokens, num_kv_heads, head_dim], value [num_tokens, num_kv_heads, value_dim]; strides key_token, key_head,
    value_token, value_head. The caches are as in decode. All rows are aligned to 16 bytes. With shared_kv no kernel
    uses value and value_cache.
    """
    return _match(name, handle, f"uint{8 * ITEMSIZES[spec.dtype]}")


def match_slot_mapping(handle: Var) -> Buffer:
    """slot_mapping [num_tokens], int64: block * block_size + slot, or a negative number."""
    return _match("slot_mapping", handle, "int64")


def match_status(handle: Var) -> Buffer:
    """status [1], int32: 0, or what a kernel has found wrong with the indices of the call (check.py)."""
    return _match("status", handle, "int32")


def match_report(handle: Var) -> Buffer:
    """report [fields], int64, in memory that the host sees (check.py)."""
    return _match("report", handle, "int64")


def _match(name: str, handle: Var, dtype: str) -> Buffer:
    return IRBuilder.name(name, T.match_buffer(handle, (Var(f"{name}_span", "int64"),), dtype))
