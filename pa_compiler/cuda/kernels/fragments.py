"""Keys and values from the ring to the registers of a tensor core, the first operands of mma.m16n8k16.

With g = lane / 4 and c = lane % 4, register i of such an operand has two neighbours of its columns 2c + i / 2 * 8, in
row g + i % 2 * 8 (PTX ISA, matrix fragments). In QK a row is a token and a column an element of head_dim, in PV a row
is an element of value_dim and a column a token. Which element it is may be any that the query, and acc, are of too.

Elements of 16 bits lie in the ring as ldmatrix has them, and are in order. ldmatrix moves codes in pairs, and so a lane
gets four that are neighbours in head_dim of one token, or two neighbours in value_dim of two tokens. They stay in that
lane: its columns are then elements 4c to 4c + 3 of a key, and its rows elements 2g and 2g + 1 of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.elements import operand_of_codes
from pa_compiler.cuda.kernels.ring import chunk_offset
from pa_compiler.cuda.tiles import TensorCoreTiling
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


class Fragments(NamedTuple):
    """How operands are loaded: functions for the body of a kernel.

    Attributes:
        load_keys: (ring, keys, token, k, lane, frag[4]): elements k of 16 of the keys of 16 tokens from `token` of a
            tile on.
        load_values: (ring, values, token, k, lane, frag[4]): the same of values.
        query_element: (k, half, lane) -> the first of the two elements of a query that belong to registers 2 * half
            and 2 * half + 1 of keys.
        value_element: (k, i, lane) -> the element of a value that is in registers i and i + 2, i from 0 to 1.
    """

    load_keys: Callable[..., None]
    load_values: Callable[..., None]
    query_element: Callable[[Expr, Expr, Expr], Expr]
    value_element: Callable[[Expr, Expr, Expr], Expr]


def fragments(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Fragments:
    """Those of a spec's caches."""
    return of_codes(spec, tiling) if tiling.element.is_code else of_numbers(spec, tiling)


def of_numbers(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Fragments:
    """Of elements of 16 bits: an operand is four matrices."""
    key_rows, value_rows = tiling.key_rows(spec), tiling.value_rows(spec)
    load = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16"

    @inline
    def load_keys(ring, keys, token, k, lane, frag):
        row = T.meta_var(token + T.truncmod(lane, 16))
        T.ptx[load.format("")](
            frag[0], frag[1], frag[2], frag[3],
            ring.ptr_to([keys + chunk_offset(key_rows, row, 2 * k + T.truncdiv(lane, 16))]),
        )  # fmt: skip

    @inline
    def load_values(ring, values, token, k, lane, frag):
        row = T.meta_var(token + T.truncdiv(lane, 16) * 8 + T.truncmod(lane, 8))
        chunk = T.meta_var(2 * k + T.truncmod(T.truncdiv(lane, 8), 2))
        T.ptx[load.format(".trans")](
            frag[0], frag[1], frag[2], frag[3], ring.ptr_to([values + chunk_offset(value_rows, row, chunk)])
        )

    return Fragments(
        load_keys,
        load_values,
        query_element=lambda k, half, lane: k * 16 + half * 8 + T.truncmod(lane, 4) * 2,
        value_element=lambda k, i, lane: k * 16 + i * 8 + T.truncdiv(lane, 4),
    )


def of_codes(spec: PagedAttentionSpec, tiling: TensorCoreTiling) -> Fragments:
    """Of codes: a chunk has the 16 elements of an operand, which is two matrices of pairs of codes."""
    key_rows, value_rows = tiling.key_rows(spec), tiling.value_rows(spec)
    load, convert = "ldmatrix.sync.aligned.m8n8.x2{}.shared.b16", operand_of_codes(tiling.element, spec.dtype)

    @inline
    def load_keys(ring, keys, token, k, lane, frag):
        words = T.alloc_buffer((2,), "uint32", scope="local")
        place = T.meta_var(keys + chunk_offset(key_rows, token + T.truncmod(lane, 16), k))
        T.ptx[load.format("")](words[0], words[1], ring.ptr_to([place]))
        for i in T.unroll(2):
            convert(words[i], 0, 1, frag, i)
            convert(words[i], 2, 3, frag, 2 + i)

    @inline
    def load_values(ring, values, token, k, lane, frag):
        words = T.alloc_buffer((2,), "uint32", scope="local")
        place = T.meta_var(values + chunk_offset(value_rows, token + T.truncmod(lane, 16), k))
        T.ptx[load.format(".trans")](words[0], words[1], ring.ptr_to([place]))
        for i in T.unroll(2):
            convert(words[i], 0, 2, frag, 2 * i)
            convert(words[i], 1, 3, frag, 2 * i + 1)

    return Fragments(
        load_keys,
        load_values,
        query_element=lambda k, half, lane: k * 16 + T.truncmod(lane, 4) * 4 + half * 2,
        value_element=lambda k, i, lane: k * 16 + T.truncdiv(lane, 4) * 2 + i,
    )
