"""Every kind of bad argument: its exception, a message with the argument and both values, and nothing written."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from dlpack import CUDA, Exported
from inputs import DTYPES, INT32, make_inputs
from numpy.lib.stride_tricks import as_strided
from refusals import (
    LENGTHS,
    SPEC,
    assert_refused,
    decode_call,
    far,
    misaligned,
    nowhere,
    over,
    read_only,
    strided,
    with_at,
    with_byte_strides,
)
from specs import DTYPE_SPECS
from tolerances import assert_same_bits

BFLOAT16 = DTYPES["bfloat16"]


def inside_out(call, name):
    """An argument, with its values, moved into out's memory."""
    array = getattr(call, name)
    moved = over(call.out, array.dtype, array.shape)
    moved[...] = array
    return {name: moved}


class RefusesDLPack:
    """An array of a library that does not hand its memory over."""

    shape = (4, 6, 24)

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_):
        raise BufferError("it is lent")


def exported_as(array, code, bits=8):
    """An array that is said to be of another dtype."""
    return Exported(array, dtype=(code, bits))


def long(array):
    return array.astype(np.int64)


V, T, I = ValueError, TypeError, IndexError  # noqa: E741  (a column of this table)

# id, error, the argument at fault, what its message also has to show, the argument in place of a good call's one
BAD = [
    ("query_rank_2", V, "query", "[batch,6,24] [6,24]", lambda c: c.query[0]),
    ("query_rank_4", V, "query", "[batch,6,24] [1,4,6,24]", lambda c: c.query[None]),
    ("query_heads", V, "query", "6 5", lambda c: c.query[:, :5]),
    ("query_head_dim", V, "query", "24 23", lambda c: c.query[..., :23]),
    ("query_float32", T, "query", "float16 float32", lambda c: c.query.astype(np.float32)),
    ("query_bfloat16", T, "query", "float16 bfloat16", lambda c: c.query.astype(BFLOAT16)),
    ("query_int16", T, "query", "float16 int16", lambda c: c.query.view(np.int16)),
    ("query_big_endian", T, "query", "float16", lambda c: c.query.astype(">f2")),
    ("query_bool", T, "query", "float16 bool", lambda c: c.query.astype(bool)),
    ("query_complex64", T, "query", "float16 complex64", lambda c: c.query.astype(np.complex64)),
    ("query_objects", T, "query", "float16 object", lambda c: c.query.astype(object)),
    ("query_masked", T, "query", "mask filled()", lambda c: np.ma.masked_array(c.query)),
    ("query_float8_of_dlpack", T, "query", "float16 float8_e5m2", lambda c: exported_as(c.query, 12)),
    ("query_float4_of_dlpack", T, "query", "float16 float4_e2m1fn", lambda c: exported_as(c.query, 17)),
    ("query_bool_of_dlpack", T, "query", "float16 bool", lambda c: exported_as(c.query, 6)),
    ("query_complex_of_dlpack", T, "query", "float16 complex64", lambda c: exported_as(c.query, 5, 64)),
    ("query_unknown_dtype", T, "query", "float16 8 200", lambda c: exported_as(c.query, 200)),
    ("query_without_memory", V, "query", "memory", lambda c: nowhere(c.query)),
    ("query_in_the_first_page", V, "query", "memory 0x40", lambda c: nowhere(c.query, 64)),
    ("query_at_an_offset_of_nothing", V, "query", "memory 0x40000040", lambda c: nowhere(c.query, (1 << 30) + 64)),
    ("query_float8", T, "query", "float16 float8_e4m3fn", lambda c: c.query.astype(ml_dtypes.float8_e4m3fn)),
    ("query_scalar", T, "query", "float16", lambda c: c.query[0, 0, 0]),
    ("query_list", T, "query", "list", lambda c: c.query.tolist()),
    ("query_none", T, "query", "NoneType", lambda c: None),
    ("query_last_axis_stride", V, "query", "1 2", lambda c: strided(c.query)),
    ("query_last_axis_reversed", V, "query", "1 -1", lambda c: c.query[..., ::-1]),
    ("query_misaligned", V, "query", "2", lambda c: misaligned(c.query)),
    ("query_strides_in_bytes", V, "query", "2 51", lambda c: with_byte_strides(c.query, 288, 51, 2)),
    ("query_on_gpu", V, "query", "1 2", lambda c: Exported(c.query, device=CUDA)),
    ("query_refuses", T, "query", "DLPack lent", lambda c: RefusesDLPack()),
    ("query_no_array", T, "query", "DLPack", lambda c: np.ndarray),
    ("key_rank_3", V, "key_cache", "[num_blocks,8,2,24] [8,2,24]", lambda c: c.key_cache[0]),
    ("key_rank_5", V, "key_cache", "[num_blocks,8,2,24] [1,10,8,2,24]", lambda c: c.key_cache[None]),
    ("key_block_size", V, "key_cache", "8 7", lambda c: c.key_cache[:, :7]),
    ("key_kv_heads", V, "key_cache", "2 1", lambda c: c.key_cache[:, :, :1]),
    ("key_head_dim", V, "key_cache", "24 20", lambda c: c.key_cache[..., :20]),
    ("key_other_layout", V, "key_cache", "8 2", lambda c: c.key_cache.swapaxes(1, 2)),
    ("key_float32", T, "key_cache", "float16 float32", lambda c: c.key_cache.astype(np.float32)),
    ("key_uint8", T, "key_cache", "float16 uint8", lambda c: c.key_cache.view(np.uint8)),
    ("key_last_axis_stride", V, "key_cache", "1 2", lambda c: strided(c.key_cache)),
    ("key_misaligned", V, "key_cache", "2", lambda c: misaligned(c.key_cache)),
    ("key_on_gpu", V, "key_cache", "1 2", lambda c: Exported(c.key_cache, device=CUDA)),
    ("key_rank_0", V, "key_cache", "[num_blocks,8,2,24] []", lambda c: c.key_cache[0, 0, 0, 0, ...]),
    ("key_strides_in_bytes", V, "key_cache", "2 49", lambda c: with_byte_strides(c.key_cache, 768, 96, 49, 2)),
    ("key_string", T, "key_cache", "str", lambda c: "cache"),
    ("value_none", T, "value_cache", "NoneType", lambda c: None),
    ("value_rank_3", V, "value_cache", "[num_blocks,8,2,24] [8,2,24]", lambda c: c.value_cache[0]),
    ("value_block_size", V, "value_cache", "8 4", lambda c: c.value_cache[:, ::2]),
    ("value_head_dim", V, "value_cache", "24 12", lambda c: c.value_cache[..., :12]),
    ("value_num_blocks", V, "value_cache", "10 9", lambda c: c.value_cache[:9]),
    ("value_float64", T, "value_cache", "float16 float64", lambda c: c.value_cache.astype(np.float64)),
    ("value_last_axis_stride", V, "value_cache", "1 2", lambda c: strided(c.value_cache)),
    ("value_misaligned", V, "value_cache", "2", lambda c: misaligned(c.value_cache)),
    ("value_on_gpu", V, "value_cache", "1 2", lambda c: Exported(c.value_cache, device=CUDA)),
    ("value_list", T, "value_cache", "list", lambda c: c.value_cache.tolist()),
    ("value_bytes", T, "value_cache", "bytes", lambda c: c.value_cache.tobytes()),
    ("table_rank_1", V, "block_table", "[4,max_blocks] [4]", lambda c: c.block_table[0]),
    ("table_batch", V, "block_table", "4 3", lambda c: c.block_table[:3]),
    ("table_int16", T, "block_table", "int32 int64 int16", lambda c: c.block_table.astype(np.int16)),
    ("table_uint32", T, "block_table", "int32 int64 uint32", lambda c: c.block_table.view(np.uint32)),
    ("table_float32", T, "block_table", "int32 int64 float32", lambda c: c.block_table.view(np.float32)),
    ("table_last_axis_stride", V, "block_table", "1 2", lambda c: strided(c.block_table)),
    ("table_misaligned", V, "block_table", "4", lambda c: misaligned(c.block_table)),
    ("table_big_endian", T, "block_table", "int32", lambda c: c.block_table.astype(">i4")),
    ("table_on_gpu", V, "block_table", "1 2", lambda c: Exported(c.block_table, device=CUDA)),
    ("table_list", T, "block_table", "list", lambda c: c.block_table.tolist()),
    ("table_width_0", V, "context_lens", "0 9", lambda c: {"block_table": c.block_table[:, :0]}),
    ("lens_rank_0", V, "context_lens", "[4] []", lambda c: c.context_lens[0, ...]),
    ("lens_rank_2", V, "context_lens", "[4] [1,4]", lambda c: c.context_lens[None]),
    ("lens_batch", V, "context_lens", "4 5", lambda c: np.zeros(5, np.int32)),
    ("lens_uint64", T, "context_lens", "int32 int64 uint64", lambda c: c.context_lens.astype(np.uint64)),
    ("lens_float64", T, "context_lens", "int32 int64 float64", lambda c: c.context_lens.astype(np.float64)),
    ("lens_stride", V, "context_lens", "1 2", lambda c: strided(c.context_lens)),
    ("lens_misaligned", V, "context_lens", "4", lambda c: misaligned(c.context_lens)),
    ("lens_on_gpu", V, "context_lens", "1 2", lambda c: Exported(c.context_lens, device=CUDA)),
    ("lens_none", T, "context_lens", "NoneType", lambda c: None),
    ("lens_minus_1", V, "context_lens", "0 -1 1", lambda c: with_at(c.context_lens, 1, -1)),
    ("lens_int_min", V, "context_lens", f"{INT32.min} 3", lambda c: with_at(c.context_lens, 3, INT32.min)),
    ("lens_over_capacity", V, "context_lens", "32 33", lambda c: with_at(c.context_lens, 0, 33)),
    ("lens_int64_wraps", V, "context_lens", f"32 {2**32 + 9} 0", lambda c: with_at(long(c.context_lens), 0, 2**32 + 9)),
    ("lens_int64_min", V, "context_lens", f"{-(2**63)} 1", lambda c: with_at(long(c.context_lens), 1, -(2**63))),
    ("lens_int_max", V, "context_lens", f"32 {INT32.max} 2", lambda c: with_at(c.context_lens, 2, INT32.max)),
    ("id_minus_1", I, "block_table", "-1 10 0", lambda c: with_at(c.block_table, (0, 0), -1)),
    ("id_num_blocks", I, "block_table", "10 0 1", lambda c: with_at(c.block_table, (0, 1), 10)),
    ("id_int_min", I, "block_table", f"{INT32.min} 10 3 0", lambda c: with_at(c.block_table, (3, 0), INT32.min)),
    ("id_int_max", I, "block_table", f"{INT32.max} 10 3 0", lambda c: with_at(c.block_table, (3, 0), INT32.max)),
    ("id_int64_wraps", I, "block_table", f"{2**32} 10 0 1", lambda c: with_at(long(c.block_table), (0, 1), 2**32)),
    ("id_int64_max", I, "block_table", f"{2**63 - 1} 2 2", lambda c: with_at(long(c.block_table), (2, 2), 2**63 - 1)),
    ("id_int64_min", I, "block_table", f"{-(2**63)} 3 0", lambda c: with_at(long(c.block_table), (3, 0), -(2**63))),
    ("id_of_short_block", I, "block_table", "99 10 2", lambda c: with_at(c.block_table, (2, 2), 99)),
    ("no_blocks", I, "block_table", "0", lambda c: {"key_cache": c.key_cache[:0], "value_cache": c.value_cache[:0]}),
    ("scale_nan", V, "scale", "finite nan", lambda c: float("nan")),
    ("scale_inf", V, "scale", "finite inf", lambda c: float("inf")),
    ("scale_minus_inf", V, "scale", "finite -inf", lambda c: -np.inf),
    ("scale_over_float32", V, "scale", "finite", lambda c: 1e39),
    ("scale_int_over_float", V, "scale", "finite 1329", lambda c: 10**400),
    ("scale_int_under_float", V, "scale", "finite negative 16610", lambda c: -(10**5000)),
    ("scale_array_nan", V, "scale", "finite nan", lambda c: np.array(np.nan)),
    ("scale_array_bool", T, "scale", "True ndarray", lambda c: np.array(True)),
    ("scale_array_string", T, "scale", "0.1 ndarray", lambda c: np.array("0.1")),
    ("scale_array_complex", T, "scale", "1j ndarray", lambda c: np.array(1j)),
    ("scale_array_of_one", T, "scale", "[1] ndarray", lambda c: np.ones(1)),
    ("scale_string", T, "scale", "str", lambda c: "1.0"),
    ("scale_bool", T, "scale", "bool", lambda c: True),
    ("scale_complex", T, "scale", "complex", lambda c: 1j),
    ("scale_array", T, "scale", "[4] ndarray", lambda c: np.ones(4)),
    ("out_rank_1", V, "out", "[4,6,24] [576]", lambda c: c.out.reshape(-1)),
    ("out_rank_4", V, "out", "[4,6,24] [4,6,24,1]", lambda c: c.out[..., None]),
    ("out_side_by_side_width", V, "out", "[4,144] [4,143]", lambda c: c.out.reshape(4, -1)[:, :143]),
    ("out_side_by_side_batch", V, "out", "[4,144] [3,144]", lambda c: c.out.reshape(4, -1)[:3]),
    ("out_side_by_side_float16", T, "out", "float32 float16", lambda c: c.out.astype(np.float16).reshape(4, -1)),
    ("query_wraps", V, "query", "56 [4,6,24]", lambda c: far(c.query, 1 << 62)),
    ("key_wraps", V, "key_cache", f"56 [{1 << 61},48,24,1]", lambda c: far(c.key_cache, 1 << 62)),
    ("value_wraps_below", V, "value_cache", f"56 [{-(1 << 61)},48,24,1]", lambda c: far(c.value_cache, -(1 << 62))),
    ("key_of_2**56_bytes", V, "key_cache", "56", lambda c: far(c.key_cache, (1 << 56) // 9)),
    ("table_wraps", V, "block_table", "56", lambda c: far(c.block_table, 1 << 62)),
    ("out_wraps", V, "out", "56", lambda c: far(c.out, 1 << 62)),
    ("lse_wraps", V, "lse", "56", lambda c: far(c.lse, -(1 << 62))),
    ("out_side_by_side_overlaps", V, "out", "overlap", lambda c: as_strided(c.out, (4, 144), (64, 4))),
    ("out_batch", V, "out", "4 3", lambda c: c.out[:3]),
    ("out_heads", V, "out", "6 5", lambda c: c.out[:, :5]),
    ("out_head_dim", V, "out", "24 23", lambda c: c.out[..., :23]),
    ("out_float16", T, "out", "float32 float16", lambda c: c.out.astype(np.float16)),
    ("out_list", T, "out", "list", lambda c: c.out.tolist()),
    ("out_read_only", V, "out", "read-only", lambda c: read_only(c.out)),
    ("out_last_axis_stride", V, "out", "1 2", lambda c: strided(c.out)),
    ("out_misaligned", V, "out", "4", lambda c: misaligned(c.out)),
    ("out_on_gpu", V, "out", "1 2", lambda c: Exported(c.out, device=CUDA)),
    ("out_broadcast_sequences", V, "out", "overlap", lambda c: as_strided(c.out, strides=(0, 96, 4))),
    ("out_heads_overlap", V, "out", "overlap", lambda c: as_strided(c.out, strides=(576, 92, 4))),
    ("out_over_query", V, "out", "query", lambda c: inside_out(c, "query")),
    ("out_over_key_cache", V, "out", "key_cache", lambda c: over(c.key_cache, np.float32, c.out.shape)),
    ("out_over_value_cache", V, "out", "value_cache", lambda c: over(c.value_cache, np.float32, c.out.shape)),
    ("out_over_block_table", V, "out", "block_table", lambda c: inside_out(c, "block_table")),
    ("out_over_context_lens", V, "out", "context_lens", lambda c: inside_out(c, "context_lens")),
    ("out_strides_in_bytes", V, "out", "4 99", lambda c: with_byte_strides(c.out, 594, 99, 4)),
    ("lse_rank_3", V, "lse", "[4,6] [1,4,6]", lambda c: c.lse[None]),
    ("lse_heads", V, "lse", "6 2", lambda c: c.lse[:, :2]),
    ("lse_batch", V, "lse", "4 2", lambda c: c.lse[::2]),
    ("lse_float64", T, "lse", "float32 float64", lambda c: c.lse.astype(np.float64)),
    ("lse_list", T, "lse", "list", lambda c: c.lse.tolist()),
    ("lse_last_axis_stride", V, "lse", "1 2", lambda c: strided(c.lse)),
    ("lse_misaligned", V, "lse", "4", lambda c: misaligned(c.lse)),
    ("lse_read_only", V, "lse", "read-only", lambda c: read_only(c.lse)),
    ("lse_broadcast_sequences", V, "lse", "overlap", lambda c: as_strided(c.lse, strides=(0, 4))),
    ("lse_over_out", V, "lse", "out", lambda c: over(c.out, np.float32, c.lse.shape)),
    ("lse_over_query", V, "lse", "query", lambda c: over(c.query, np.float32, c.lse.shape)),
    ("lse_over_key_cache", V, "lse", "key_cache", lambda c: over(c.key_cache, np.float32, c.lse.shape)),
    ("lse_over_value_cache", V, "lse", "value_cache", lambda c: over(c.value_cache, np.float32, c.lse.shape)),
    ("key_without_memory", V, "key_cache", "memory", lambda c: nowhere(c.key_cache)),
    ("value_without_memory", V, "value_cache", "memory", lambda c: nowhere(c.value_cache)),
    ("table_without_memory", V, "block_table", "memory", lambda c: nowhere(c.block_table)),
    ("lens_without_memory", V, "context_lens", "memory", lambda c: nowhere(c.context_lens)),
    ("out_without_memory", V, "out", "memory", lambda c: nowhere(c.out)),
    ("lse_without_memory", V, "lse", "memory", lambda c: nowhere(c.lse)),
    ("lse_on_gpu", V, "lse", "1 2", lambda c: Exported(c.lse, device=CUDA)),
]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("error", "argument", "shows", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_refused_before_anything_is_written(compiled, figure, error, argument, shows, change):
    good = decode_call()
    changed = change(good)
    changed = changed if isinstance(changed, dict) else {argument: changed}
    call = {**vars(good), **changed}
    arrays = [*vars(good).values(), *changed.values()]
    assert_refused(lambda: compiled(SPEC).decode(**call), error, argument, shows, arrays)
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_odd_strides_of_bfloat16_are_refused(compiled, figure, name, axis):
    """The fused kernels read pairs of elements as words. The staged ones, which do not, take any strides."""
    spec = DTYPE_SPECS["bfloat16"]
    inputs = make_inputs(spec, LENGTHS)
    cache = getattr(inputs, name)
    strides = [1]
    for inner in (2, 1, 0):  # one element more than the rows in it take
        strides.insert(0, strides[0] * cache.shape[inner + 1] + (inner == axis))
    room = np.zeros(sum((e - 1) * s for e, s in zip(cache.shape, strides, strict=True)) + 1, cache.dtype)
    odd = as_strided(room, cache.shape, [stride * cache.itemsize for stride in strides])
    odd[...] = cache
    out = inputs.out
    shown = re.escape(str(strides))
    with pytest.raises(ValueError, match=rf"^{name}: expected strides in multiples of 2 elements, got {shown}$"):
        compiled(spec).decode(*inputs.replace(**{name: odd}).arguments, out=out)
    assert_same_bits(out, inputs.out)
    figure("kinds", 1)
    expected = compiled(spec, "staged").decode(*inputs.arguments)
    assert_same_bits(compiled(spec, "staged").decode(*inputs.replace(**{name: odd}).arguments), expected)


def test_one_block_may_have_an_odd_stride(compiled):
    """It is never stepped over."""
    spec = DTYPE_SPECS["bfloat16"]
    inputs = make_inputs(spec, [5], spare_blocks=0)
    odd = as_strided(inputs.key_cache, inputs.key_cache.shape, (14, *inputs.key_cache.strides[1:]))
    module = compiled(spec)
    assert_same_bits(module.decode(*inputs.replace(key_cache=odd).arguments), module.decode(*inputs.arguments))


def test_the_good_call_is_good(compiled):
    call = decode_call()
    compiled(SPEC).decode(**vars(call))
    assert np.isfinite(call.out).all()


def test_neighbours_in_memory_do_not_overlap(compiled):
    """The last byte of one array next to the first byte of another: query, out, lse, query's copy."""
    good = decode_call()
    room = np.zeros(2 * good.query.nbytes + good.out.nbytes + good.lse.nbytes, np.uint8)
    start = 0
    for name in ("query", "out", "lse"):
        array = getattr(good, name)
        moved = over(room[start:], array.dtype, array.shape)
        moved[...] = array
        setattr(good, name, moved)
        start += array.nbytes
    compiled(SPEC).decode(**vars(good))
    assert np.isfinite(good.out).all()
