"""Keys and values on their way from the paged caches into a warp's ring in shared memory, by asynchronous copies.

The ring is [stages, 2, tile_tokens, pitch] chunks of 16 bytes, keys before values. For ldmatrix, which reads one chunk
of 8 rows, chunk c of row r lies at c ^ (r % 8) of its row, or, where a row is not whole multiples of 8 chunks, at c of
a row of an odd number of them: 8 rows then never meet in a bank. Where lanes read rows side by side, rows lie as they
are. Tokens past the end of a range are not read: their rows are filled with zeros, so that a probability of 0 meets no
NaN.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.tiling import BANK_CHUNKS, CHUNK_BYTES, CHUNK_WORDS, WARP, CudaTiling, copy_lanes
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline


def chunk_offset(spec: PagedAttentionSpec, tiling: CudaTiling, row: Expr, chunk: Expr) -> Expr:
    """32-bit words from the start of a tile to a chunk of a row."""
    if tiling.swizzled(spec):
        chunk = T.bitwise_xor(chunk, T.truncmod(row, BANK_CHUNKS))
    return (row * tiling.pitch(spec) + chunk) * CHUNK_WORDS


def look_up(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """block[0] = the block of token start + lane % tile_tokens of a sequence; past its end, of the last token."""
    tokens, block_size = tiling.tile_tokens, spec.block_size

    @inline
    def stage(block_table, table_offset, start, range_end, lane, block):
        entry: T.int32 = T.truncdiv(T.min(start + T.truncmod(lane, tokens), range_end - 1), block_size)
        block[0] = block_table[table_offset + T.Cast("int64", entry)]

    return stage


def copy_tile(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """Start to copy the keys and values of tokens [start, start + tile_tokens) to the ring, from word `keys` on.

    block[0] is what look_up left for the same start. Offsets in the caches are int64, in elements.
    """
    chunks, elements = tiling.chunks(spec), tiling.chunk_elements(spec)
    side = copy_lanes(chunks)
    rows = WARP // side  # that the lanes of a warp copy at once
    block_size, values = spec.block_size, tiling.tile_words(spec)
    copy = "cp.async.cg.shared.global.L2::128B"

    @inline
    def stage(key_cache, value_cache, ring, keys, k_block, k_row, k_head, v_block, v_row, v_head, block, start,
              range_end, lane):  # fmt: skip
        for i in T.unroll(tiling.tile_tokens // rows):
            row: T.int32 = i * rows + T.truncdiv(lane, side)
            token: T.int32 = start + row
            number: T.int32 = T.cuda.__shfl_sync(T.uint32(ALL_LANES), block[0], row, WARP)
            slot: T.int32 = T.truncmod(token, block_size)
            key: T.int64 = T.Cast("int64", number) * k_block + T.Cast("int64", slot) * k_row + k_head
            value: T.int64 = T.Cast("int64", number) * v_block + T.Cast("int64", slot) * v_row + v_head
            size: T.uint32 = T.Select(token < range_end, T.uint32(CHUNK_BYTES), T.uint32(0))
            first: T.int32 = T.truncmod(lane, side)
            for c in T.unroll(chunks // side):
                chunk = T.meta_var(c * side + first)
                place = T.meta_var(keys + chunk_offset(spec, tiling, row, chunk))
                T.ptx[copy](
                    ring.ptr_to([place]), key_cache.ptr_to([key + T.Cast("int64", chunk * elements)]), CHUNK_BYTES, size
                )
                T.ptx[copy](
                    ring.ptr_to([place + values]),
                    value_cache.ptr_to([value + T.Cast("int64", chunk * elements)]),
                    CHUNK_BYTES,
                    size,
                )

    return stage
