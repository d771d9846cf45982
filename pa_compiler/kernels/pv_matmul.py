"""Stage 3: tile_acc = probs @ value tile."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels import state
from pa_compiler.kernels.caches import reader, value_access, whole
from pa_compiler.kernels.computed import words_of
from pa_compiler.kernels.elements import HIGH, LOW, product_of, zero_of
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


def pv_matmul(spec: PagedAttentionSpec, tiling: Tiling, few: bool = False) -> Callable[..., None]:
    """tile_acc[slot, r, d] = sum over t < valid_len of weights[slot, r, t] * value of the token in column t.

    In the caller's sblock, for head tiles, slots and a head as in qk_matmul. The sum stops at valid_len: values in
    unused slots are not multiplied by 0, they are not read. First come all whole groups of token_group tokens, then the
    rest of the last one. num_full counts the first, and is bound outside of the caller's sblock: schedules allocate as
    much in it. A value that a mask, of which computed has the words, does not show counts as 0.

    Where pairs are multiplied it is the sum over t of dot_pairs(weights[slot, r, t], values of the tokens in the
    columns 2t and 2t + 1). The value past an odd valid_len is replaced by 0. Of fours, which are numbers whatever
    memory holds, nothing is replaced: weights of 0 leave them out.

    With few, of the first few_rows rows alone.
    """
    of, rows = ("few_", tiling.few_rows) if few else ("", tiling.row_tile)
    dim, group, terms = spec.result_dim, tiling.token_group, tiling.values.terms
    tokens, num_tiles, group_tiles = tiling.padded_kv_tile, tiling.pass_tiles(spec), tiling.row_tiles(spec)
    read = reader(value_access(spec, tiling), tiling.values, tiling.copy_values)
    product, zero = product_of(tiling.values), zero_of(tiling.values)

    def valid(word, t, tile):
        if terms != 2 or tile.sight is not None:
            return word
        return T.bitwise_and(word, T.Select(2 * t + 1 < tile.valid_len, -1, LOW))

    def seen(value, t, tile):
        """What is multiplied by a weight of 0, since the window does not reach it, is 0 and not what memory holds."""
        if tile.first_seen is None or terms == 4:
            return value
        if terms == 1:
            return T.Select(tile.sees(t), value, T.float32(0))
        return T.bitwise_and(value, T.Select(tile.sees(2 * t), -1, T.Select(tile.sees(2 * t + 1), HIGH, 0)))

    def shown(value, computed, slot, row, t):
        """The same of what a mask does not show."""
        for word in words_of(computed, slot, row, t) if terms < 4 else ():
            if terms == 2:
                return T.bitwise_and(value, word)
            return T.reinterpret("float32", T.bitwise_and(T.reinterpret("int32", value), word))
        return value

    def at_edge(value, edges, row, t):
        """The same of what a row does not see of the tokens after the first num_full groups."""
        if edges is None:
            return value
        if terms == 2:
            return T.bitwise_and(value, edges[row, t])
        return T.reinterpret("float32", T.bitwise_and(T.reinterpret("int32", value), edges[row, t]))

    @inline
    def stage(weights, values, head_offset, tile, num_full, tile_acc, slot, computed=None, edges=None):
        full_acc = T.sblock_alloc_buffer((num_tiles, rows, dim), tiling.values.sum_dtype)
        for i, to, ti, r, d in T.grid(num_tiles, num_full, group // terms, rows, dim):
            with T.sblock(f"{of}full_groups"):
                vt = T.axis.reduce(tokens // terms, to * (group // terms) + ti)
                vi, vr, vd = T.axis.remap("SSS", [i, r, d])
                at = T.meta_var(slot if num_tiles == 1 else slot + vi)
                now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * values.head)
                T.reads(
                    weights[at, vr, vt],
                    whole(values.memory),
                    values.offsets[vt * terms : vt * terms + terms],
                    *words_of(computed, at, vr, vt),
                )
                T.writes(full_acc[vi, vr, vd])
                with T.init():
                    full_acc[vi, vr, vd] = zero
                value = T.meta_var(seen(read(values, vt, now, vd), vt, tile))
                full_acc[vi, vr, vd] += product(weights[at, vr, vt], shown(value, computed, at, vr, vt))
        for i, ti, r, d in T.grid(num_tiles, T.ceildiv(tile.rest(num_full), terms), rows, dim):
            with T.sblock(f"{of}tile_acc"):
                vt = T.axis.reduce(tokens // terms, num_full * (group // terms) + ti)
                vi, vr, vd = T.axis.remap("SSS", [i, r, d])
                at = T.meta_var(slot if num_tiles == 1 else slot + vi)
                now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * values.head)
                T.reads(
                    full_acc[vi, vr, vd],
                    weights[at, vr, vt],
                    whole(values.memory),
                    values.offsets[vt * terms : vt * terms + terms],
                    *words_of(computed, at, vr, vt),
                    *([] if edges is None else [edges[vr, vt]]),
                )
                T.writes(tile_acc[at, vr, vd])
                with T.init():
                    tile_acc[at, vr, vd] = full_acc[vi, vr, vd]
                value = T.meta_var(valid(at_edge(seen(read(values, vt, now, vd), vt, tile), edges, vr, vt), vt, tile))
                tile_acc[at, vr, vd] += product(weights[at, vr, vt], shown(value, computed, at, vr, vt))

    return stage


def pv_update(spec: PagedAttentionSpec, tiling: Tiling) -> Callable[..., None]:
    """The sblock pv_update of decode: the outputs of the head tiles, and their fold into the running state."""
    num_tiles, rows, dim = tiling.pass_tiles(spec), tiling.row_tile, spec.result_dim
    pv_stage, fold_stage = pv_matmul(spec, tiling), state.fold(num_tiles, rows, dim)

    @inline
    def stage(weights, values, value_head, tile, factors, running, step, num_steps, computed):
        num_full: T.let = tile.num_full
        with T.sblock("pv_update"):
            T.reads()
            T.writes()
            tile_acc = T.sblock_alloc_buffer((num_tiles, rows, dim), tiling.values.sum_dtype)
            pv_stage(weights, values, value_head, tile, num_full, tile_acc, 0, computed)
            fold_stage(tile_acc, 0, factors, running.acc, running.slot, step, num_steps)

    return stage
