"""Where tokens lie in the paged caches: the one place that turns positions into blocks, slots and memory."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling


def token_offsets(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """offsets[t] = elements from the start of a cache to token tile_start + t of a sequence, in kv head 0; int64.

    For t < num_offsets. At and past last_token the last valid token is named again: an offset is always that of a token
    within the sequence's length, so that whatever is read through the table may be read. Products with a stride are
    int64: caches of more than 2**31 elements are ordinary.

    A cache is seen as one span of memory with the strides (in elements) of its blocks and of the slots in a block: the
    kernels do not know NHD from HND.
    """
    block_size, size = spec.block_size, tiling.num_offsets

    @T.inline
    def stage(block_table, offsets, seq, tile_start, last_token, num_offsets, block_stride, slot_stride):
        with T.sblock("token_offsets"):
            T.reads(block_table[seq, 0 : block_table.shape[1]])
            T.writes(offsets[0:size])
            for t in range(num_offsets):
                with T.sblock("offset"):
                    vt = T.axis.spatial(size, t)
                    token: T.let = T.min(tile_start + vt, last_token)
                    offsets[vt] = (
                        T.Cast("int64", block_table[seq, T.floordiv(token, block_size)]) * block_stride
                        + T.Cast("int64", T.floormod(token, block_size)) * slot_stride
                    )

    return stage


def load_tile(spec: PagedAttentionSpec, tiling: Tiling, name: str) -> Callable[..., None]:
    """The sblock name: copy[t, d] = float32(element d of token t), for num_groups groups of token_group tokens."""
    head_dim, group, tokens = spec.head_dim, tiling.token_group, tiling.padded_kv_tile

    @T.inline
    def stage(cache, cache_offsets, copy, head_offset, num_groups):
        with T.sblock(name):
            T.reads(whole(cache), cache_offsets[0 : tiling.num_offsets])
            T.writes(copy[0:tokens, 0:head_dim])
            for to, ti, d in T.grid(num_groups, group, head_dim):
                with T.sblock(f"{name}_element"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vd = T.axis.spatial(head_dim, d)
                    T.reads(whole(cache), cache_offsets[vt])
                    T.writes(copy[vt, vd])
                    copy[vt, vd] = T.Cast("float32", cache[cache_offsets[vt] + head_offset + T.Cast("int64", vd)])

    return stage


def element(tiling: Tiling) -> Callable[..., Expr]:
    """A function (source, offsets, t, head_offset, d) -> element d of token t as float32.

    source is what load_tile made where the tiling copies tiles, and the cache itself where it does not.
    """

    def copied(source, offsets, t, head_offset, d):
        return source[t, d]

    def in_place(source, offsets, t, head_offset, d):
        return T.Cast("float32", source[offsets[t] + head_offset + T.Cast("int64", d)])

    return copied if tiling.copy_tiles else in_place


def whole(buffer: Buffer) -> BufferRegion:
    """All of a buffer, for T.reads and T.writes."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def prefetch(cache: Buffer, offset: Expr) -> Expr:
    """Ask for the cache line of an element, to be read soon: into the second-level cache."""
    return T.call_intrin("void", "tirx.prefetch", T.address_of(cache[offset]), 0, 2, 1)
