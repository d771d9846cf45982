"""Stage 3: tile_acc = probs @ value tile."""

import operator
from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.cache_access import load, load_copied, prefetch, value_access, whole
from pa_compiler.kernels.pairs import LOW, dot_pairs
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling, divisors
from pa_compiler.tvmscript import inline


def pv_matmul(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """tile_acc[slot, r, d] = sum over t < valid_len of probs[slot, r, t] * value of token t; in the caller's sblock.

    The sum stops at valid_len: values in unused slots are not multiplied by 0, they are not read. First come all whole
    groups of token_group tokens, then the rest of the last one. values and the tile that comes next are as in
    qk_matmul's keys; that tile is fetched row by row, whatever the order in which this one is read.

    num_full is valid_len // token_group, bound outside of the caller's sblock: schedules allocate as much in it.

    Or the sum over t of dot_pairs(probs[slot, r, t], values of the tokens 2t and 2t + 1). The value past an odd
    valid_len is replaced by 0.
    """
    rows, head_dim, group, pair = tiling.row_tile, spec.head_dim, tiling.token_group, tiling.dot_elements
    tokens, offsets = tiling.padded_kv_tile, tiling.num_offsets
    one_tile = tiling.sweep is None
    num_tiles, group_tiles = tiling.pass_tiles(spec), tiling.row_tiles(spec)
    access = value_access(spec, tiling)
    read, lines = load_copied if tiling.copy_values else load(tiling, access), access.num_lines
    product = dot_pairs if tiling.dot_pairs else operator.mul
    passes = tiling.pv_passes(spec)
    fetching = fetching_passes(passes, group, lines)
    fetches, every = group * lines // fetching, passes // fetching

    def pass_of(r, d):
        return T.floordiv(r, tiling.pv_rows) * (head_dim // tiling.pv_dims) + T.floordiv(d, tiling.pv_dims)

    def steps(tokens):
        return T.ceildiv(tokens, 2) if tiling.dot_pairs else tokens

    def valid(word, t, valid_len):
        return T.bitwise_and(word, T.Select(2 * t + 1 < valid_len, -1, LOW)) if tiling.dot_pairs else word

    @inline
    def stage(
        probs,
        values,
        value_cache,
        value_offsets,
        tile_acc,
        slot,
        head_offset,
        head_stride,
        row_stride,
        ahead_t,
        ahead_offset,
        valid_len,
        num_full,
    ):
        full_acc = T.sblock_alloc_buffer((num_tiles, rows, head_dim), "float32")
        if tiling.prefetches:
            # never touched: it ties the fetches to the loops
            fetched = T.sblock_alloc_buffer((tokens // group, passes, fetches), "int8")
            for to, pi, ni in T.grid(num_full, passes, fetches):
                with T.sblock("prefetch_values"):
                    vo = T.axis.spatial(tokens // group, to)
                    vp, vn = T.axis.remap("SS", [pi, ni])
                    T.reads(value_offsets[0:offsets])
                    T.writes(fetched[vo, vp, vn])
                    if T.And(T.floormod(vp, every) == 0, vp < every * fetching):
                        number: T.let = (T.floordiv(vp, every) * num_full + vo) * fetches + vn
                        T.evaluate(
                            prefetch(value_cache, access.line(value_offsets, ahead_t, number, ahead_offset, row_stride))
                        )
        for i, to, ti, r, d in T.grid(num_tiles, num_full, group // pair, rows, head_dim):
            with T.sblock("full_groups"):
                vt = T.axis.reduce(tokens // pair, to * (group // pair) + ti)
                vi, vr, vd = T.axis.remap("SSS", [i, r, d])
                at = T.meta_var(slot if one_tile else slot + vi)
                now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * head_stride)
                T.reads(
                    probs[at, vr, vt],
                    whole(values),
                    value_offsets[vt * pair : vt * pair + pair],
                    *(
                        [fetched[T.floordiv(vt, group // pair), pass_of(vr, vd), 0:fetches]]
                        if tiling.prefetches
                        else []
                    ),
                )
                T.writes(full_acc[vi, vr, vd])
                with T.init():
                    full_acc[vi, vr, vd] = T.float32(0)
                full_acc[vi, vr, vd] += product(probs[at, vr, vt], read(values, value_offsets, vt, now, row_stride, vd))
        for i, ti, r, d in T.grid(num_tiles, steps(T.floormod(valid_len, group)), rows, head_dim):
            with T.sblock("tile_acc"):
                vt = T.axis.reduce(tokens // pair, num_full * (group // pair) + ti)
                vi, vr, vd = T.axis.remap("SSS", [i, r, d])
                at = T.meta_var(slot if one_tile else slot + vi)
                now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * head_stride)
                T.reads(
                    full_acc[vi, vr, vd],
                    probs[at, vr, vt],
                    whole(values),
                    value_offsets[vt * pair : vt * pair + pair],
                )
                T.writes(tile_acc[at, vr, vd])
                with T.init():
                    tile_acc[at, vr, vd] = full_acc[vi, vr, vd]
                tile_acc[at, vr, vd] += product(
                    probs[at, vr, vt],
                    valid(read(values, value_offsets, vt, now, row_stride, vd), vt, valid_len),
                )

    return stage


def fetching_passes(passes: int, group: int, lines: int) -> int:
    """In how many of the passes over a tile of tokens, at most, its next values are fetched.

    In each pass a group of tokens is the time to fetch some whole tokens of `lines` lines, or an equal part of one: so
    that no line's address takes a division at run time.
    """
    return max(count for count in divisors(group) + [group * part for part in divisors(lines)] if count <= passes)
