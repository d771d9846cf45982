"""Stage 3: tile_acc = probs @ value tile."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.cache_access import element, prefetch, value_access, whole
from pa_compiler.kernels.inline import inline
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiling import Tiling


def pv_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_acc[slot, r, d] = sum over t < valid_len of probs[slot, r, t] * value of token t.

    The sum stops at valid_len: values in unused slots are not multiplied by 0, they are not read. First come all whole
    groups of token_group tokens, then the rest of the last one. values and the tile that comes next are as in
    qk_matmul's keys; that tile is fetched row by row, whatever the order in which this one is read.
    """
    rows, head_dim, group = tiling.row_tile, spec.head_dim, tiling.token_group
    tokens, offsets = tiling.padded_kv_tile, tiling.num_offsets
    access = value_access(spec, tiling)
    load, lines = element(tiling, access), access.num_lines

    @inline
    def stage(
        probs,
        values,
        value_cache,
        value_offsets,
        tile_acc,
        slot,
        head_offset,
        row_stride,
        ahead_t,
        ahead_offset,
        valid_len,
    ):
        with T.sblock("pv_matmul"):
            T.reads(probs[slot, 0:rows, 0:tokens], whole(values), whole(value_cache), value_offsets[0:offsets])
            T.writes(tile_acc[slot, 0:rows, 0:head_dim])
            full_acc = T.sblock_alloc_buffer((rows, head_dim), "float32")
            fetched = T.sblock_alloc_buffer((tokens, lines), "int8")  # never touched: it ties the fetches to the loops
            num_full: T.let = T.floordiv(valid_len, group)
            for to, ti, li in T.grid(num_full, group, lines):
                with T.sblock("prefetch_values"):
                    vo = T.axis.spatial(tokens // group, to)
                    vi, vl = T.axis.remap("SS", [ti, li])
                    T.reads(value_offsets[0:offsets])
                    T.writes(fetched[vo * group + vi, vl])
                    number: T.let = ahead_t * lines + (vl * num_full + vo) * group + vi
                    T.evaluate(prefetch(value_cache, access.line(value_offsets, number, ahead_offset, row_stride)))
            for to, ti, r, d in T.grid(num_full, group, rows, head_dim):
                with T.sblock("full_groups"):
                    vt = T.axis.reduce(tokens, to * group + ti)
                    vr, vd = T.axis.remap("SS", [r, d])
                    T.reads(
                        probs[slot, vr, vt],
                        whole(values),
                        value_offsets[vt],
                        fetched[vt, T.floordiv(vd * lines, head_dim)],
                    )
                    T.writes(full_acc[vr, vd])
                    with T.init():
                        full_acc[vr, vd] = T.float32(0)
                    full_acc[vr, vd] += probs[slot, vr, vt] * load(
                        values, value_offsets, vt, head_offset, row_stride, vd
                    )
            for ti, r, d in T.grid(T.floormod(valid_len, group), rows, head_dim):
                with T.sblock("tile_acc"):
                    vt = T.axis.reduce(tokens, num_full * group + ti)
                    vr, vd = T.axis.remap("SS", [r, d])
                    T.reads(full_acc[vr, vd], probs[slot, vr, vt], whole(values), value_offsets[vt])
                    T.writes(tile_acc[slot, vr, vd])
                    with T.init():
                        tile_acc[slot, vr, vd] = full_acc[vr, vd]
                    tile_acc[slot, vr, vd] += probs[slot, vr, vt] * load(
                        values, value_offsets, vt, head_offset, row_stride, vd
                    )

    return stage
