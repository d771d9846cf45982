"""Keys and values on their way from the paged caches into a warp's ring in shared memory, by asynchronous copies.

The ring is [stages] times a tile of keys and, behind it, one of values: [tile_tokens, pitch] chunks of 16 bytes, each
with a pitch of its own; and behind them the scales of the keys and of the values, where tokens have any. For ldmatrix,
which reads one chunk of 8 rows, chunk c of row r lies at c ^ (r % 8) of its row, or, where a row is not whole multiples
of 8 chunks, at c of a row of an odd number of them: 8 rows then never meet in a bank. Where lanes read rows side by
side, rows lie as they are, or a few chunks further apart. Tokens past the end of a range are not read: their rows are
filled with zeros, so that a probability of 0 meets no NaN.

With shared_kv a value is the beginning of its key: only keys are copied, and values are read where those lie.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from pa_compiler.cuda.kernels.plan import ALL_LANES
from pa_compiler.cuda.kernels.scales import copy_scales
from pa_compiler.cuda.kernels.scores import Functions
from pa_compiler.cuda.tiles import BANK_CHUNKS, CHUNK_BYTES, CHUNK_WORDS, WARP, CudaTiling, RingRows, copy_lanes
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tvmscript import inline

COPY = "cp.async.cg.shared.global.L2::128B"


def chunk_offset(rows: RingRows, row: Expr, chunk: Expr) -> Expr:
    """32-bit words from the start of a tile of such rows to a chunk of a row."""
    if rows.swizzled:
        chunk = T.bitwise_xor(chunk, T.truncmod(row, BANK_CHUNKS))
    return (row * rows.pitch + chunk) * CHUNK_WORDS


def look_up(spec: PagedAttentionSpec, tiling: CudaTiling) -> Callable[..., None]:
    """block[0] = the block of token start + lane % tile_tokens of a sequence; past its end, of the last token."""
    tokens, block_size = tiling.tile_tokens, spec.block_size

    @inline
    def stage(block_table, table_offset, start, range_end, lane, block):
        entry: T.int32 = T.truncdiv(T.min(start + T.truncmod(lane, tokens), range_end - 1), block_size)
        block[0] = block_table[table_offset + T.Cast("int64", entry)]

    return stage


def copy_tile(spec: PagedAttentionSpec, tiling: CudaTiling, functions: Functions) -> Callable[..., None]:
    """Start to copy the keys and values of tokens [start, start + tile_tokens) to the ring, from word `tile` on.

    block[0] is what look_up left for the same start. key_cache and value_cache are of arrays.Cache. Of a token that no
    row sees nothing is read, whatever block_table names for it: its rows are zeros, as those past the end. (Of a mask
    that goes by the row its bounds alone say so.)
    """
    side, values_at = copy_lanes(spec), tiling.values_at(spec)
    rows = WARP // side  # that the lanes of a warp copy at once
    copy_key = copy_row(spec, tiling, tiling.key_rows(spec))
    copy_value = copy_row(spec, tiling, tiling.value_rows(spec))
    copy_scales_stage, scales_at = copy_scales(spec, tiling), tiling.scales_at(spec)

    @inline
    def stage(key_cache, value_cache, scales, ring, tile, block, start, range_end, lane, scoring):
        for i in T.unroll(tiling.tile_tokens // rows):
            row: T.int32 = i * rows + T.truncdiv(lane, side)
            token: T.int32 = start + row
            number: T.int32 = T.cuda.__shfl_sync(T.uint32(ALL_LANES), block[0], row, WARP)
            slot: T.int32 = T.truncmod(token, spec.block_size)
            if functions.hides_tokens:
                shown: T.bool = (token < range_end) & functions.shows(scoring, token)
                number = T.Select(shown, number, 0)
            copied = T.meta_var(shown if functions.hides_tokens else token < range_end)
            size: T.uint32 = T.Select(copied, T.uint32(CHUNK_BYTES), T.uint32(0))
            copy_key(key_cache, number, slot, ring, tile, row, T.truncmod(lane, side), size)
            if not spec.shared_kv:
                copy_value(value_cache, number, slot, ring, tile + values_at, row, T.truncmod(lane, side), size)
        if spec.token_scales:
            own: T.int32 = start + lane
            has: T.bool = own < range_end
            if functions.hides_tokens:
                has = has & functions.shows(scoring, own)
            copy_scales_stage(
                scales, T.Select(has, block[0], 0), T.truncmod(own, spec.block_size), ring, tile + scales_at, lane, has
            )

    return stage


def copy_row(spec: PagedAttentionSpec, tiling: CudaTiling, rows: RingRows) -> Callable[..., None]:
    """Start to copy `size` bytes, 16 or 0, of a lane's chunks of a slot to a row of the tile at word `tile`.

    Chunk `first` and every copy_lanes-th after it are the lane's.
    """
    side, elements = copy_lanes(spec), tiling.chunk_elements(spec)

    @inline
    def stage(cache, number, slot, ring, tile, row, first, size):
        source: T.int64 = T.Cast("int64", number) * cache.block + T.Cast("int64", slot) * cache.row + cache.head
        for c in T.unroll(rows.chunks // side):
            chunk = T.meta_var(c * side + first)
            T.ptx[COPY](
                ring.ptr_to([tile + chunk_offset(rows, row, chunk)]),
                cache.memory.ptr_to([source + T.Cast("int64", chunk * elements)]),
                CHUNK_BYTES,
                size,
            )

    return stage
