"""append_kv: keys and values of new tokens into their slots of the paged cache, in every layout.

Where a cache holds codes, quantise.py makes them. Elements of others are moved as unsigned integers of their size: NaNs
keep their bits, and float16 and bfloat16 are one kernel.
"""

from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from pa_compiler import tvmscript as script
from pa_compiler.kernels.quantise import quantise
from pa_compiler.kernels.quantise_rows import quantise_rows
from pa_compiler.spec import ITEMSIZES, PagedAttentionSpec

# (block, slot, head, d) -> where element d of a head's key or value lies in its cache
_Place = Callable[[Expr, Expr, Expr, Expr], tuple[Expr, ...]]


def append_row(spec: PagedAttentionSpec) -> PrimFunc:
    """cache at slot_mapping[t] = new[t], for the kv heads [head_begin, head_begin + num_heads): of keys or values."""
    return _append(spec, "append_row", spec.head_dim, spec.key_cache_shape[1:], _row(spec), adjacent=spec.head_dim)


def append_key(spec: PagedAttentionSpec) -> PrimFunc:
    """key_cache at slot_mapping[t] = key[t], for the kv heads [head_begin, head_begin + num_heads)."""
    pair = spec.packed_pair

    def place(block, slot, head, d):
        return block, head, T.floordiv(d, pair), slot * pair + T.floormod(d, pair)  # of int4 the last in elements

    packed, dim = spec.kv_layout == "packed", spec.head_dim
    adjacent = pair if packed else dim
    return _append(spec, "append_key", dim, spec.key_cache_shape[1:], place if packed else _row(spec), adjacent)


def append_value(spec: PagedAttentionSpec) -> PrimFunc:
    """value_cache at slot_mapping[t] = value[t], for the kv heads [head_begin, head_begin + num_heads)."""
    pair = spec.packed_pair

    def place(block, slot, head, d):
        return block, head, T.truncdiv(slot, T.int64(pair)), d * pair + T.truncmod(slot, T.int64(pair))

    packed, dim = spec.kv_layout == "packed", spec.result_dim
    adjacent = 1 if packed and pair > 1 else dim
    return _append(spec, "append_value", dim, spec.value_cache_shape[1:], place if packed else _row(spec), adjacent)


def _row(spec: PagedAttentionSpec) -> _Place:
    """In NHD and HND a key or a value is a row."""
    if spec.kv_layout == "NHD":
        return lambda block, slot, head, d: (block, slot, head, d)
    return lambda block, slot, head, d: (block, head, slot, d)


def _append(
    spec: PagedAttentionSpec, name: str, dim: int, extents: Sequence[int], place: _Place, adjacent: int
) -> PrimFunc:
    """The PrimFunc name(new, cache, slot_mapping, head_begin, num_heads).

    new: [num_tokens, num_kv_heads, dim], its last axis contiguous. cache: [num_blocks, *extents], likewise.
    slot_mapping: int64 [num_tokens], block * block_size + slot; a token with a negative one is skipped. The caller has
    checked that the others are below num_blocks * block_size. Tokens are written in their order, head by head: where
    two have the same slot, the later one stays.

    Args:
        spec: The shape.
        name: The PrimFunc's name.
        dim: Elements of a head's key or value.
        extents: Of one block of the cache.
        place: Where an element lies in the cache; block and slot are int64 and not negative.
        adjacent: Of the dim elements, how many lie side by side in the cache.
    """
    if spec.token_scales:
        return quantise_rows(spec, name, dim, extents, place, in_rows=adjacent > 1)
    if spec.has_scales:
        return quantise(spec, name, dim, extents, place)
    kv_heads, block_size = T.int64(spec.num_kv_heads), T.int64(spec.block_size)
    itemsize = ITEMSIZES[spec.dtype]
    bits = f"uint{8 * itemsize}"
    first, second, third = (T.int64(extent) for extent in extents)

    @script.prim_func(s_tir=True)
    def append(
        new_handle: T.handle,
        cache_handle: T.handle,
        slot_mapping_handle: T.handle,
        head_begin: T.int32,
        num_heads: T.int32,
    ):
        num_tokens, num_blocks = T.int64(), T.int64()
        new_token, new_head = T.int64(), T.int64()
        cache_0, cache_1, cache_2 = T.int64(), T.int64(), T.int64()
        new = T.match_buffer(
            new_handle, (num_tokens, kv_heads, T.int64(dim)), bits, strides=[new_token, new_head, T.int64(1)],
            align=itemsize,
        )  # fmt: skip
        cache = T.match_buffer(
            cache_handle, (num_blocks, first, second, third), bits,
            strides=[cache_0, cache_1, cache_2, T.int64(1)], align=itemsize,
        )  # fmt: skip
        slot_mapping = T.match_buffer(slot_mapping_handle, (num_tokens,), "int64", align=8)
        for h, t in T.grid(num_heads, num_tokens):
            with T.sblock("token"):
                vh = T.axis.opaque(num_heads, h)
                vt = T.axis.opaque(num_tokens, t)
                T.reads()
                T.writes()
                target: T.let = slot_mapping[vt]
                if target >= T.int64(0):
                    for run, i in T.grid(dim // adjacent, adjacent):
                        with T.sblock("element"):
                            vd = T.axis.spatial(dim, run * adjacent + i)
                            T.reads(new[vt, head_begin + vh, vd])
                            T.writes(cache[0:num_blocks, 0:first, 0:second, 0:third])
                            where = T.meta_var(
                                place(
                                    T.truncdiv(target, block_size), T.truncmod(target, block_size), head_begin + vh, vd
                                )
                            )
                            cache[where[0], where[1], where[2], where[3]] = new[vt, head_begin + vh, vd]

    return append.with_attr("global_symbol", name)
