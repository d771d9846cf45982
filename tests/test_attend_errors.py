"""Bad arguments of attend: each is named with both values, and nothing is written."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from dlpack import Exported
from ragged_inputs import make_ragged
from refusals import SPEC, assert_refused, misaligned, over, strided, with_at

V, T, I = ValueError, TypeError, IndexError  # noqa: E741  (a column of this table)
SEQUENCES = [
    (3, 9),
    (0, 4),
    (1, 20),
    (2, 7),
]  # 7 blocks in use and 3 spare; max_blocks is 3 + 2, a capacity of 40 tokens


def good_call():
    ragged = make_ragged(SPEC, SEQUENCES)
    names = ("query", "key_cache", "value_cache", "block_table", "context_lens", "query_start_loc")
    arrays = dict(zip(names, ragged.arguments, strict=True))
    out, lse = np.full((6, 6, 24), np.nan, np.float32), np.full((6, 6), np.nan, np.float32)
    return types.SimpleNamespace(**arrays, scale=None, out=out, lse=lse, causal=True, tree_mask=np.ones(14, bool))


def inside_out(call, name):
    """An argument, with its values, moved into out's memory."""
    array = getattr(call, name)
    moved = over(call.out, array.dtype, array.shape)
    moved[...] = array
    return {name: moved}


# id, error, the argument at fault, what its message also has to show, what is given in place of a good call's
BAD = [
    ("query_rank", V, "query", "[num_tokens,6,24] [6,24]", lambda c: {"query": c.query[0]}),
    ("query_heads", V, "query", "6 5", lambda c: {"query": c.query[:, :5]}),
    ("query_dtype", T, "query", "float16 float32", lambda c: {"query": c.query.astype(np.float32)}),
    ("query_list", T, "query", "list", lambda c: {"query": c.query.tolist()}),
    ("query_last_axis_stride", V, "query", "1 2", lambda c: {"query": strided(c.query)}),
    ("key_block_size", V, "key_cache", "8 7", lambda c: {"key_cache": c.key_cache[:, :7]}),
    ("value_none", T, "value_cache", "NoneType", lambda c: {"value_cache": None}),
    ("table_batch", V, "block_table", "4 3", lambda c: {"block_table": c.block_table[:3]}),
    ("table_dtype", T, "block_table", "int32 int64 int16", lambda c: {"block_table": c.block_table.astype("i2")}),
    ("table_id", I, "block_table", "[0,10) 10 2", lambda c: {"block_table": with_at(c.block_table, (2, 1), 10)}),
    ("table_negative", I, "block_table", "[0,10) -1 0", lambda c: {"block_table": with_at(c.block_table, (0, 0), -1)}),
    ("lens_rank", V, "context_lens", "[batch] [1,4]", lambda c: {"context_lens": c.context_lens[None]}),
    ("lens_negative", V, "context_lens", "0 40 -1", lambda c: {"context_lens": with_at(c.context_lens, 1, -1)}),
    ("lens_beyond", V, "context_lens", "0 40 41", lambda c: {"context_lens": with_at(c.context_lens, 1, 41)}),
    ("starts_none", T, "query_start_loc", "NoneType", lambda c: {"query_start_loc": None}),
    ("starts_rank", V, "query_start_loc", "[5] [1,5]", lambda c: {"query_start_loc": c.query_start_loc[None]}),
    ("starts_count", V, "query_start_loc", "[5] [4]", lambda c: {"query_start_loc": c.query_start_loc[1:]}),
    ("starts_dtype", T, "query_start_loc", "int64 int8", lambda c: {"query_start_loc": c.query_start_loc.astype("i1")}),
    ("starts_strided", V, "query_start_loc", "1 2", lambda c: {"query_start_loc": strided(c.query_start_loc)}),
    ("starts_misaligned", V, "query_start_loc", "4", lambda c: {"query_start_loc": misaligned(c.query_start_loc)}),
    ("starts_late", V, "query_start_loc", "0 1", lambda c: {"query_start_loc": with_at(c.query_start_loc, 0, 1)}),
    ("starts_fall", V, "query_start_loc", "2 3 2", lambda c: {"query_start_loc": with_at(c.query_start_loc, 2, 2)}),
    ("starts_end", V, "query_start_loc", "6 5", lambda c: {"query_start_loc": with_at(c.query_start_loc, 4, 5)}),
    ("starts_int64", V, "query_start_loc", "7 4294967298",
     lambda c: {"query_start_loc": with_at(c.query_start_loc.astype(np.int64), 4, 2**32 + 6)}),
    ("more_than_context", V, "query_start_loc", "2 0 3", lambda c: {"context_lens": with_at(c.context_lens, 0, 2)}),
    ("one_of_none", V, "query_start_loc", "0 2 1", lambda c: {"context_lens": with_at(c.context_lens, 2, 0)}),
    ("out_batch", V, "out", "[6,6,24] [4,6,24]", lambda c: {"out": c.out[:4]}),
    ("out_dtype", T, "out", "float32 float16", lambda c: {"out": c.out.astype(np.float16)}),
    ("lse_batch", V, "lse", "[6,6] [5,6]", lambda c: {"lse": c.lse[:5]}),
    ("out_over_starts", V, "out", "query_start_loc", lambda c: inside_out(c, "query_start_loc")),
    ("out_over_tree", V, "out", "tree_mask", lambda c: inside_out(c, "tree_mask")),
    ("out_over_query", V, "out", "query", lambda c: inside_out(c, "query")),
    ("tree_size", V, "tree_mask", "[14] [13]", lambda c: {"tree_mask": c.tree_mask[:13]}),
    ("tree_of_tokens", V, "tree_mask", "[14] [36]", lambda c: {"tree_mask": np.ones(36, bool)}),
    ("tree_rank", V, "tree_mask", "[2,7]", lambda c: {"tree_mask": c.tree_mask.reshape(2, 7)}),
    ("tree_dtype", T, "tree_mask", "bool uint8 int32", lambda c: {"tree_mask": c.tree_mask.astype(np.int32)}),
    ("tree_int8_of_dlpack", T, "tree_mask", "bool uint8 int8",
     lambda c: {"tree_mask": Exported(c.tree_mask.view(np.int8), dtype=(0, 8))}),
    ("tree_strided", V, "tree_mask", "1 2", lambda c: {"tree_mask": strided(c.tree_mask)}),
    ("tree_nowhere", V, "tree_mask", "memory", lambda c: {"tree_mask": Exported(c.tree_mask, dtype=(1, 8), address=0)}),
    ("tree_list", T, "tree_mask", "list", lambda c: {"tree_mask": c.tree_mask.tolist()}),
    ("tree_not_causal", V, "tree_mask", "causal=True causal=False", lambda c: {"causal": False}),
    ("scale", V, "scale", "inf", lambda c: {"scale": float("inf")}),
    ("slopes", T, "alibi_slopes", "alibi", lambda c: {"alibi_slopes": np.zeros(6, np.float32)}),
    ("inputs", T, "inputs", "bias", lambda c: {"inputs": {"bias": np.zeros(3, np.float32)}}),
    ("check", V, "check", "'host' 'device'", lambda c: {"check": "device"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "argument", "shows", "change"), [each[1:] for each in BAD], ids=[each[0] for each in BAD]
)
def test_bad_arguments(compiled, error, argument, shows, change):
    module, call = compiled(SPEC, attend=True), good_call()
    arguments = vars(call) | change(call)
    arrays = [array for array in (*vars(call).values(), *arguments.values()) if isinstance(array, np.ndarray)]
    assert_refused(lambda: module.attend(**arguments), error, argument, shows, arrays)


def test_the_good_call_is_good(compiled):
    call = good_call()
    compiled(SPEC, attend=True).attend(**vars(call))
    assert np.isfinite(call.out).all()
    assert np.isfinite(call.lse).all()


def test_ids_that_no_query_token_needs_are_not_looked_at(compiled):
    """Those of a sequence without query tokens, past a context, and before a window, of several query tokens too."""
    call = good_call()
    call.block_table[1] = 99
    compiled(SPEC, attend=True).attend(**vars(call))
    ragged = make_ragged(SPEC, [(3, 33)])
    table = ragged.inputs.block_table.copy()
    table[0, :2] = 99  # the first of the query tokens, at position 30, sees keys from 16 on
    windowed = compiled(dataclasses.replace(SPEC, window=15), attend=True)
    windowed.attend(*ragged.arguments[:3], table, *ragged.arguments[4:])
    table[0, 2] = 99
    with pytest.raises(IndexError, match=r"got 99 for sequence 0 at position 2$"):
        windowed.attend(*ragged.arguments[:3], table, *ragged.arguments[4:])
