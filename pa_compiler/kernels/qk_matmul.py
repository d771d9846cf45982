"""Stage 1: scores = query tile @ key tile^T."""

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.caches import key_access, reader, whole
from pa_compiler.kernels.elements import product_of, zero_of
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling
from pa_compiler.tvmscript import inline


def qk_matmul(spec: PagedAttentionSpec, tiling: Tiling, few: bool = False) -> Callable[..., None]:
    """scores[slot, r, t] = sum over d of q_tile[first, r, d] * key of the token in column t, for t < valid_len.

    For the pass_tiles head tiles from `first` on, in the slots from `slot` on; the first of them reads the kv head at
    head_offset. Where pairs are multiplied it is the sum of dot_pairs(q_tile[first, r, d], pair d of that key), which
    loses nothing: a product of two bfloat16 numbers is one of float32. Of integers the sums are exact too, and int32.
    Tokens are visited in groups of token_group. The last group is filled up with tokens of the same sequence, whose
    scores are finite wherever the valid ones are; or, packed, with lanes of the same block, whose scores mean nothing.

    With few, of the first few_rows rows alone, and for few_groups token groups at a time.
    """
    rows, depth = tiling.few_rows if few else tiling.row_tile, spec.head_dim // tiling.keys.terms
    of, groups = ("few_", tiling.few_groups) if few else ("", 1)
    group = tiling.token_group * groups
    tokens, num_tiles, group_tiles = tiling.padded_kv_tile, tiling.pass_tiles(spec), tiling.row_tiles(spec)
    read = reader(key_access(spec, tiling), tiling.keys, tiling.copy_keys)
    product, zero = product_of(tiling.keys), zero_of(tiling.keys)

    def num_groups(tile):
        return tile.num_groups if groups == 1 else T.ceildiv(tile.num_groups, groups)

    @inline
    def stage(q_tile, first, keys, head_offset, tile, scores, slot):
        with T.sblock(f"{of}qk_matmul"):
            T.reads(q_tile[first : first + num_tiles, 0:rows, 0:depth], whole(keys.memory), whole(keys.offsets))
            T.writes(scores[slot : slot + num_tiles, 0:rows, 0:tokens])
            for i, to, ti, r, d in T.grid(num_tiles, num_groups(tile), group, rows, depth):
                with T.sblock(f"{of}scores"):
                    vt = T.axis.spatial(tokens, to * group + ti)
                    vi, vr, vd = T.axis.remap("SSR", [i, r, d])
                    at = T.meta_var(slot if num_tiles == 1 else slot + vi)
                    now = T.meta_var(head_offset + T.Cast("int64", T.floordiv(vi, group_tiles)) * keys.head)
                    with T.init():
                        scores[at, vr, vt] = zero
                    scores[at, vr, vt] += product(q_tile[first + vi, vr, vd], read(keys, vt, now, vd))

    return stage
