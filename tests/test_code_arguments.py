"""kv_dtype, kv_scale, and scales in calls: what a spec may say, what is taken, and what is refused."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from inputs import DTYPES, make_inputs

import pa_compiler
from pa_compiler import PagedAttentionSpec

PLAIN = PagedAttentionSpec(4, 2, 32, 16, "bfloat16")
INT8 = dataclasses.replace(PLAIN, kv_dtype="int8")
INT4 = dataclasses.replace(PLAIN, kv_dtype="int4")
DOTS = {"kv_dtype": "int4", "kv_dots": "int8"}
E4M3 = dataclasses.replace(PLAIN, kv_dtype="float8_e4m3fn", kv_scale="head")


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        (
            {"kv_dtype": "int3"},
            ValueError,
            "kv_dtype: expected one of bfloat16, int8, float8_e4m3fn, float8_e5m2, int4",
        ),
        ({"kv_dtype": "int4", "kv_rotation": "random"}, ValueError, "kv_rotation: expected one of hadamard, none"),
        (
            {"kv_dtype": "int4", "head_dim": 48},
            ValueError,
            "head_dim: expected a power of two for kv_rotation hadamard unless kv_rotation is none",
        ),
        ({"kv_dtype": "int4", "value_dim": 24}, ValueError, "value_dim: expected a power of two for kv_rotation"),
        (
            {"kv_dtype": "int4", "kv_rotation": "none", "head_dim": 7},
            ValueError,
            "head_dim: expected a multiple of 2 with kv_dtype int4, got 7",
        ),
        ({"kv_rotation": "hadamard"}, ValueError, "kv_rotation: expected None without a kv_dtype other than dtype"),
        (
            {"kv_dtype": "float8_e5m2", "kv_rotation": "hadamard"},
            ValueError,
            "kv_rotation: expected None or none with kv_dtype float8_e5m2",
        ),
        ({"kv_dtype": "int4", "kv_scale": "head"}, ValueError, "kv_scale: expected token_head with kv_dtype int4"),
        ({"kv_dtype": "float16"}, ValueError, "kv_dtype: expected one of"),
        ({"kv_dtype": 8}, TypeError, "kv_dtype: expected a string, got 8"),
        ({"kv_scale": "tensor"}, ValueError, "kv_scale: expected None without a kv_dtype other than dtype"),
        ({"kv_dtype": "int8", "kv_scale": "tensor"}, ValueError, "kv_scale: expected token_head with kv_dtype int8"),
        ({"kv_dtype": "int8", "kv_scale": "channel"}, ValueError, "kv_scale: expected one of tensor, head, token_head"),
        (
            {"kv_dtype": "float8_e5m2", "kv_scale": "token_head"},
            ValueError,
            "kv_scale: expected tensor or head with kv_dtype float8_e5m2",
        ),
        ({"kv_dtype": "int8", "shared_kv": True}, ValueError, "shared_kv: expected False with kv_dtype int8"),
        ({"kv_dots": "int8"}, ValueError, "kv_dots: expected None without a kv_dtype other than dtype, got 'int8'"),
        (
            {"kv_dtype": "int8", "kv_dots": "int8"},
            ValueError,
            "kv_dots: expected None with kv_dtype int8, .* got 'int8'",
        ),
        (
            {"kv_dtype": "float8_e5m2", "kv_dots": "int8"},
            ValueError,
            "kv_dots: expected None with kv_dtype float8_e5m2",
        ),
        (DOTS | {"kv_dots": "int16"}, ValueError, "kv_dots: expected one of int8, got 'int16'"),
        (DOTS | {"kv_dots": 8}, TypeError, "kv_dots: expected a string, got 8"),
        (DOTS | {"kv_layout": "packed"}, ValueError, "kv_layout: expected NHD or HND with kv_dots int8, got 'packed'"),
        (DOTS | {"invariant": True}, ValueError, "invariant: expected False with kv_dots int8, .* got True"),
        (DOTS | {"head_dim": 16}, ValueError, "head_dim: expected a multiple of 32 with kv_dots int8, got 16"),
        (DOTS | {"value_dim": 16}, ValueError, "value_dim: expected a multiple of 32 with kv_dots int8, got 16"),
    ],
)
def test_a_spec_is_refused(fields, error, says):
    with pytest.raises(error, match=says):
        dataclasses.replace(PLAIN, **fields)


def test_dtype_as_kv_dtype_is_none():
    same = dataclasses.replace(PLAIN, kv_dtype="bfloat16")
    assert (same, same.kv_dtype, same.has_scales) == (PLAIN, None, False)


def test_the_first_scale_is_the_default():
    assert INT8.stated()["kv_scale"] == "token_head"
    assert dataclasses.replace(PLAIN, kv_dtype="float8_e5m2").scale_shape == (1,)
    assert E4M3.scale_shape == (2,)
    assert INT8.scale_shape == ("num_blocks", 2, 16)
    assert hash(dataclasses.replace(INT8, kv_scale="token_head")) == hash(INT8)


def test_int4_is_rotated_unless_it_is_not_asked_for():
    assert INT4.stated()["kv_rotation"] == "hadamard"
    assert hash(dataclasses.replace(INT4, kv_rotation="hadamard")) == hash(INT4)
    plain = dataclasses.replace(INT4, kv_rotation="none")
    assert (plain.rotates, plain.stated()["kv_rotation"]) == (False, "none")
    assert INT8.stated()["kv_rotation"] is None
    assert dataclasses.replace(INT8, kv_rotation="none") == INT8
    assert (INT4.key_cache_shape, INT4.scale_shape) == (("num_blocks", 16, 2, 16), ("num_blocks", 2, 16, 2))
    packed = dataclasses.replace(INT4, kv_layout="packed")
    assert (packed.key_cache_shape, packed.value_cache_shape) == (("num_blocks", 2, 16, 16), ("num_blocks", 2, 8, 32))


@pytest.mark.parametrize(("spec", "expected"), [(PLAIN, 256), (E4M3, 128), (INT8, 144), (INT4, 96)])
def test_bytes_of_a_token(spec, expected):
    assert spec.token_bytes == expected


def test_the_staged_pipeline_refuses_codes():
    with pytest.raises(ValueError, match=r"kv_dtype: expected bfloat16 for .*, got 'int8'"):
        pa_compiler.compile(INT8, pipeline="staged")


def test_caches_and_scales(compiled):
    key_cache, value_cache = compiled(E4M3).empty_cache(3)
    assert key_cache.dtype == value_cache.dtype == ml_dtypes.float8_e4m3fn
    assert [scale.tolist() for scale in compiled(E4M3).empty_scales(3)] == [[1, 1], [1, 1]]
    key_scale, value_scale = compiled(INT8).empty_scales(3)
    assert key_scale.shape == value_scale.shape == (3, 2, 16)
    assert not key_scale.any()
    with pytest.raises(NotImplementedError, match="empty_scales: expected a spec with a kv_dtype"):
        compiled(PLAIN).empty_scales(3)
    with pytest.raises(ValueError, match="num_blocks: expected at least 1, got 0"):
        compiled(INT8).empty_scales(0)


BAD = {
    "missing": (TypeError, "expected an array, since the spec has kv_dtype, got None", lambda scale: None),
    "float64": (TypeError, "expected dtype float32, got float64", lambda scale: scale.astype(np.float64)),
    "another rank": (ValueError, "expected shape", lambda scale: scale[None]),
    "a block less": (ValueError, "expected shape", lambda scale: scale[:-1]),
    "strided": (ValueError, "expected a contiguous last axis", lambda scale: np.repeat(scale, 2, axis=-1)[..., ::2]),
    "a number": (TypeError, "expected an array with DLPack, got float", lambda scale: 1.0),
}


@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
@pytest.mark.parametrize(("error", "says", "change"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("spec", [INT8, E4M3], ids=["int8", "e4m3"])
def test_a_scale_is_refused(compiled, spec, error, says, change, name):
    inputs = make_inputs(spec, [33, 5])
    scales = inputs.heads | {name: change(inputs.heads[name])}
    out = inputs.out
    with pytest.raises(error, match=rf"{name}: {says}"):
        compiled(spec).decode(*inputs.arguments, out=out, **scales)
    assert np.isnan(out.astype(np.float32)).all()
    key = np.zeros((1, 2, 32), DTYPES["bfloat16"])
    with pytest.raises(error, match=rf"{name}: {says}"):
        compiled(spec).append_kv(key, key, *inputs.arguments[1:3], np.zeros(1, np.int64), **scales)


def test_scales_are_refused_where_there_are_none(compiled):
    inputs = make_inputs(PLAIN, [3])
    with pytest.raises(TypeError, match="key_scale: expected None, since the spec has no kv_dtype"):
        compiled(PLAIN).decode(*inputs.arguments, key_scale=np.ones(1, np.float32))


@pytest.mark.parametrize("other", [np.int8, np.uint8, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16])
def test_a_cache_of_another_type_is_refused(compiled, other):
    inputs = make_inputs(E4M3, [3])
    cache = np.zeros(inputs.key_cache.shape, other)
    with pytest.raises(TypeError, match="key_cache: expected dtype float8_e4m3fn"):
        compiled(E4M3).decode(*inputs.replace(key_cache=cache).arguments, **inputs.heads)


def test_scales_that_are_made_are_apart_from_all_else(compiled):
    module = compiled(INT8)
    caches, (key_scale, value_scale) = module.empty_cache(2), module.empty_scales(2)
    key, slots = np.zeros((1, 2, 32), DTYPES["bfloat16"]), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="value_scale: expected memory apart from key_scale"):
        module.append_kv(key, key, *caches, slots, key_scale=key_scale, value_scale=key_scale)
    inside = caches[0].reshape(-1)[: 4 * key_scale.size].view(np.float32).reshape(key_scale.shape)
    with pytest.raises(ValueError, match="key_scale: expected memory apart from key_cache"):
        module.append_kv(key, key, *caches, slots, key_scale=inside, value_scale=value_scale)
    key_scale.flags.writeable = False
    with pytest.raises(ValueError, match="key_scale: expected a writable array"):
        module.append_kv(key, key, *caches, slots, key_scale=key_scale, value_scale=value_scale)


def test_scales_that_are_read_may_be_one_array_and_read_only(compiled):
    module = compiled(E4M3)
    caches, (scale, _) = module.empty_cache(2), module.empty_scales(2)
    scale.flags.writeable = False
    key = np.full((1, 2, 32), 3, DTYPES["bfloat16"])
    module.append_kv(key, key, *caches, np.array([17]), key_scale=scale, value_scale=scale)
    assert (caches[1][1, 1].astype(np.float32) == 3).all()


@pytest.mark.parametrize("spec", [INT8, dataclasses.replace(INT4, kv_rotation="none")], ids=["int8", "int4"])
def test_a_module_with_codes_is_saved_and_loaded(compiled, tmp_path, spec):
    compiled(spec).save(tmp_path / "codes.so")
    loaded = pa_compiler.load(tmp_path / "codes.so")
    assert loaded.spec == spec
    assert loaded.verify(0.5, seed=1).passed


def test_scales_with_zero_points(compiled):
    """They are side by side, and so are the slots of a block."""
    module, inputs = compiled(INT4), make_inputs(INT4, [33, 5])
    assert module.empty_cache(3)[0].shape == (3, 16, 2, 16)
    assert [scale.shape for scale in module.empty_scales(3)] == [(3, 2, 16, 2)] * 2
    apart = np.repeat(inputs.heads["key_scale"], 2, axis=2)[:, :, ::2]
    with pytest.raises(ValueError, match=r"key_scale: expected the slots of a block side by side \(stride 2\), got"):
        module.decode(*inputs.arguments, **inputs.heads | {"key_scale": apart})
    with pytest.raises(ValueError, match=r"value_scale: expected shape \[\d+, 2, 16, 2\], got"):
        module.decode(*inputs.arguments, **inputs.heads | {"value_scale": inputs.heads["value_scale"][..., 0].copy()})


def test_convert_cache_takes_bytes_of_two_codes():
    rng = np.random.default_rng(0)
    keys, values = (rng.integers(0, 256, (2, 16, 3, dim), np.uint8) for dim in (4, 5))
    packed = pa_compiler.convert_cache(keys, values, "NHD", "packed")
    assert [cache.shape for cache in packed] == [(2, 3, 4, 16), (2, 3, 8, 10)]
    of_keys, of_values = (np.stack([each & 15, each >> 4], axis=-1).reshape(2, 16, 3, -1) for each in (keys, values))
    for slot, head, d in [(0, 0, 0), (5, 2, 7), (15, 1, 4)]:
        assert (packed[0][1, head, d // 2, slot] >> 4 * (d % 2)) & 15 == of_keys[1, slot, head, d]
        assert (packed[1][1, head, slot // 2, d] >> 4 * (slot % 2)) & 15 == of_values[1, slot, head, d]
    for one, other in zip(pa_compiler.convert_cache(*packed, "packed", "NHD"), (keys, values), strict=True):
        np.testing.assert_array_equal(one, other)
    hnd = pa_compiler.convert_cache(keys, values, "NHD", "HND")
    np.testing.assert_array_equal(hnd[1], values.swapaxes(1, 2))


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_convert_cache_takes_codes(kv_dtype):
    cache = np.arange(2 * 16 * 3 * 5, dtype=np.uint8).view(kv_dtype).reshape(2, 16, 3, 5)
    keys, values = pa_compiler.convert_cache(cache, cache, "NHD", "HND")
    for one in (keys, values):
        assert one.dtype == cache.dtype
        assert one.tobytes() == np.ascontiguousarray(cache.swapaxes(1, 2)).tobytes()
    packed = pa_compiler.convert_cache(cache, cache, "NHD", "packed")
    assert packed[0].tobytes() == np.ascontiguousarray(cache.transpose(0, 2, 3, 1)).tobytes()
    assert packed[1].tobytes() == values.tobytes()
    assert pa_compiler.convert_cache(*packed, "packed", "NHD")[0].tobytes() == cache.tobytes()


TYPES = [
    ("int8", None, "token_head"),
    ("int8", "hadamard", "token_head"),
    ("int4", None, "token_head"),
    ("int4", "none", "token_head"),
    ("float8_e4m3fn", None, "head"),
    ("float8_e5m2", None, "tensor"),
]


@pytest.mark.parametrize("layout", ["HND", "packed"])
@pytest.mark.parametrize(("kv_dtype", "kv_rotation", "kv_scale"), TYPES)
def test_convert_cache_makes_codes_as_append_kv_does(compiled, kv_dtype, kv_rotation, kv_scale, layout):
    """And back from them, numbers that are as near as codes are."""
    fields = {"kv_dtype": kv_dtype, "kv_rotation": kv_rotation, "kv_scale": kv_scale, "kv_layout": layout}
    module, rng = compiled(dataclasses.replace(PLAIN, **fields)), np.random.default_rng(4)
    new = [rng.standard_normal((32, 2, 32)).astype(DTYPES["bfloat16"]) for _ in range(2)]
    caches, scales = module.empty_cache(2), module.empty_scales(2)
    given = {}
    if kv_scale != "token_head":
        scales = [np.linspace(0.01, 0.02, scale.size, dtype=np.float32) for scale in scales]
        given = dict(zip(("key_scale", "value_scale"), scales, strict=True))
    module.append_kv(*new, *caches, np.arange(32), key_scale=scales[0], value_scale=scales[1])
    natural = [each.reshape(2, 16, 2, 32) for each in new]
    found = pa_compiler.convert_cache(*natural, "NHD", layout, dtype=kv_dtype, kv_rotation=kv_rotation, **given)
    for one, other in zip(found, (*caches, *scales), strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    back = {"key_scale": scales[0], "value_scale": scales[1], "kv_rotation": kv_rotation}
    numbers = pa_compiler.convert_cache(*caches, layout, "NHD", dtype="float32", **back)
    for one, other in zip(numbers, natural, strict=True):
        error = np.linalg.norm(one - other.astype(np.float32)) / np.linalg.norm(other.astype(np.float32))
        assert one.dtype == np.float32
        assert error < {"int8": 0.01, "int4": 0.12, "float8_e4m3fn": 0.04, "float8_e5m2": 0.08}[kv_dtype]


def test_convert_cache_between_types_is_refused():
    cache = np.zeros((1, 16, 2, 24), np.int8)
    numbers = np.zeros((1, 16, 2, 24), np.float32)
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, .*, int4, got 'int2'"):
        pa_compiler.convert_cache(numbers, numbers, "NHD", "NHD", dtype="int2")
    with pytest.raises(ValueError, match="key_scale: expected an array beside a key_cache of int8, got None"):
        pa_compiler.convert_cache(cache, cache, "NHD", "NHD", dtype="float32")
    with pytest.raises(ValueError, match="key_cache: expected a power of two to rotate, got 24 elements"):
        pa_compiler.convert_cache(numbers, numbers, "NHD", "NHD", dtype="int4")
    with pytest.raises(ValueError, match="kv_rotation: expected one of hadamard, none, got 'random'"):
        pa_compiler.convert_cache(numbers, numbers, "NHD", "NHD", dtype="int4", kv_rotation="random")
    with pytest.raises(ValueError, match="value_cache: expected an array for another dtype, got None"):
        pa_compiler.convert_cache(numbers, None, "NHD", "NHD", dtype="int8")
