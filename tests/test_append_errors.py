"""Every kind of bad argument of append_kv: its exception, what it says, and nothing written."""

from __future__ import annotations

import numpy as np
import pytest
from dlpack import CUDA, Exported
from inputs import INT32
from numpy.lib.stride_tricks import as_strided
from refusals import SPEC, append_call, assert_refused, far, misaligned, nowhere, over, read_only, strided, with_at

V, T, I = ValueError, TypeError, IndexError  # noqa: E741  (a column of this table)

# SPEC has 2 kv heads of 24 and blocks of 8, float16. The good call has 5 tokens and 3 blocks, so 24 slots.
# id, error, the argument at fault, what its message also has to show, the argument in place of a good call's one
BAD = [
    ("key_rank", V, "key", "[num_tokens,2,24] [2,24]", lambda c: c.key[0]),
    ("key_heads", V, "key", "2 1", lambda c: c.key[:, :1]),
    ("key_head_dim", V, "key", "24 23", lambda c: c.key[..., :23]),
    ("key_float32", T, "key", "float16 float32", lambda c: c.key.astype(np.float32)),
    ("key_uint16", T, "key", "float16 uint16", lambda c: c.key.view(np.uint16)),
    ("key_list", T, "key", "list", lambda c: c.key.tolist()),
    ("key_last_axis_stride", V, "key", "1 2", lambda c: strided(c.key)),
    ("key_misaligned", V, "key", "2", lambda c: misaligned(c.key)),
    ("key_on_gpu", V, "key", "1 2", lambda c: Exported(c.key, device=CUDA)),
    ("key_cache_wraps", V, "key_cache", "56", lambda c: far(c.key_cache, 1 << 62)),
    ("value_tokens", V, "value", "[5,2,24] [4,2,24]", lambda c: c.value[:4]),
    ("value_float64", T, "value", "float16 float64", lambda c: c.value.astype(np.float64)),
    ("value_last_axis_stride", V, "value", "1 -1", lambda c: c.value[..., ::-1]),
    ("value_none", T, "value", "NoneType", lambda c: None),
    ("value_cache_none", T, "value_cache", "NoneType", lambda c: None),
    ("key_cache_layout", V, "key_cache", "[num_blocks,8,2,24] [3,2,8,24]", lambda c: c.key_cache.swapaxes(1, 2)),
    ("key_cache_rank", V, "key_cache", "[8,2,24]", lambda c: c.key_cache[0]),
    ("key_cache_float32", T, "key_cache", "float16 float32", lambda c: c.key_cache.astype(np.float32)),
    ("key_cache_last_axis_stride", V, "key_cache", "1 2", lambda c: strided(c.key_cache)),
    ("key_cache_misaligned", V, "key_cache", "2", lambda c: misaligned(c.key_cache)),
    ("key_cache_read_only", V, "key_cache", "read-only", lambda c: read_only(c.key_cache)),
    (
        "key_cache_one_block_thrice",
        V,
        "key_cache",
        "overlap",
        lambda c: as_strided(c.key_cache, strides=(0, 96, 48, 2)),
    ),
    ("key_cache_heads_overlap", V, "key_cache", "overlap", lambda c: as_strided(c.key_cache, strides=(768, 96, 46, 2))),
    ("value_cache_num_blocks", V, "value_cache", "3 2", lambda c: c.value_cache[:2]),
    ("value_cache_bfloat16", T, "value_cache", "float16 uint8", lambda c: c.value_cache.view(np.uint8)),
    ("value_cache_read_only", V, "value_cache", "read-only", lambda c: read_only(c.value_cache)),
    (
        "value_cache_rows_overlap",
        V,
        "value_cache",
        "overlap",
        lambda c: as_strided(c.value_cache, strides=(768, 48, 48, 2)),
    ),
    ("caches_the_same", V, "value_cache", "key_cache", lambda c: c.key_cache),
    ("slot_of_both_caches", V, "value_cache", "key_cache 0 8", lambda c: both_in(c, 4, 0, 1)),
    ("slot_of_both_caches_before", V, "value_cache", "key_cache 23 7", lambda c: both_in(c, 5, 2, 0)),
    ("caches_overlap_by_half_a_block", V, "value_cache", "key_cache", lambda c: half_a_block_on(c)),
    ("key_without_memory", V, "key", "memory", lambda c: nowhere(c.key)),
    ("value_without_memory", V, "value", "memory", lambda c: nowhere(c.value, 1 << 30)),
    ("key_cache_without_memory", V, "key_cache", "memory", lambda c: nowhere(c.key_cache)),
    ("value_cache_without_memory", V, "value_cache", "memory", lambda c: nowhere(c.value_cache, 1 << 30)),
    ("slots_without_memory", V, "slot_mapping", "memory", lambda c: nowhere(c.slot_mapping)),
    ("caches_overlap_by_a_slot", V, "value_cache", "key_cache", lambda c: rows_of(c, 15, 7)),
    ("key_cache_over_key", V, "key_cache", "key", lambda c: {"key": over(c.key_cache[1:], c.key.dtype, c.key.shape)}),
    ("key_cache_over_value", V, "key_cache", "value", lambda c: {"value": c.key_cache[1, :5]}),
    ("value_cache_over_key", V, "value_cache", "key", lambda c: {"key": c.value_cache[1, :5]}),
    ("value_cache_over_slots", V, "value_cache", "slot_mapping", lambda c: slots_in(c)),
    ("slots_rank", V, "slot_mapping", "[5] [5,1]", lambda c: c.slot_mapping[:, None]),
    ("slots_short", V, "slot_mapping", "[5] [4]", lambda c: c.slot_mapping[:4]),
    ("slots_int16", T, "slot_mapping", "int32 int64 int16", lambda c: c.slot_mapping.astype(np.int16)),
    ("slots_uint64", T, "slot_mapping", "int32 int64 uint64", lambda c: c.slot_mapping.astype(np.uint64)),
    ("slots_list", T, "slot_mapping", "list", lambda c: c.slot_mapping.tolist()),
    ("slots_stride", V, "slot_mapping", "1 2", lambda c: strided(c.slot_mapping)),
    ("slots_misaligned", V, "slot_mapping", "8", lambda c: misaligned(c.slot_mapping)),
    ("slot_num_slots", I, "slot_mapping", "-1 24 4", lambda c: with_at(c.slot_mapping, 4, 24)),
    ("slot_minus_2", I, "slot_mapping", "-1 24 -2 0", lambda c: with_at(c.slot_mapping, 0, -2)),
    ("slot_int32_max", I, "slot_mapping", f"24 {INT32.max} 4", lambda c: with_at(int32(c.slot_mapping), 4, INT32.max)),
    ("slot_int32_min", I, "slot_mapping", f"24 {INT32.min} 0", lambda c: with_at(int32(c.slot_mapping), 0, INT32.min)),
    ("slot_int64_max", I, "slot_mapping", f"24 {2**63 - 1} 1", lambda c: with_at(c.slot_mapping, 1, 2**63 - 1)),
    ("slot_int64_min", I, "slot_mapping", f"24 {-(2**63)} 1", lambda c: with_at(c.slot_mapping, 1, -(2**63))),
    ("slot_int32_wraps", I, "slot_mapping", f"24 {2**32} 2", lambda c: with_at(c.slot_mapping, 2, 2**32)),
    (
        "no_blocks",
        I,
        "slot_mapping",
        "0 token",
        lambda c: {"key_cache": c.key_cache[:0], "value_cache": c.value_cache[:0]},
    ),
]


def both_in(call, num_blocks, key_begin, value_begin):
    """Both caches of 3 blocks in one buffer of num_blocks."""
    room = np.zeros((num_blocks, *call.key_cache.shape[1:]), call.key_cache.dtype)
    return {"key_cache": room[key_begin : key_begin + 3], "value_cache": room[value_begin : value_begin + 3]}


def rows_of(call, slots, value_begin):
    """Block beside block, and the last slot of the one is the first of the other."""
    room = np.zeros((3, slots, *call.key_cache.shape[2:]), call.key_cache.dtype)
    return {"key_cache": room[:, :8], "value_cache": room[:, value_begin : value_begin + 8]}


def half_a_block_on(call):
    """The blocks of values begin in the middle of those of keys."""
    rows = np.zeros((4 * 8, *call.key_cache.shape[2:]), call.key_cache.dtype)
    caches = {"key_cache": rows[:24], "value_cache": rows[4:28]}
    return {name: cache.reshape(call.key_cache.shape) for name, cache in caches.items()}


def int32(array):
    return array.astype(np.int32)


def slots_in(call):
    return {"slot_mapping": over(call.value_cache[2:], np.int64, (5,))}


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("error", "argument", "shows", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_refused_before_anything_is_written(compiled, figure, error, argument, shows, change):
    good = append_call()
    changed = change(good)
    changed = changed if isinstance(changed, dict) else {argument: changed}
    call = {**vars(good), **changed}
    arrays = [*vars(good).values(), *changed.values()]
    assert_refused(lambda: compiled(SPEC).append_kv(**call), error, argument, shows, arrays)
    figure("kinds", 1)


def test_the_good_call_is_good(compiled):
    call = append_call()
    compiled(SPEC).append_kv(**vars(call))
    assert np.isfinite(call.key_cache).sum() == np.isfinite(call.value_cache).sum() == 4 * 2 * 24
