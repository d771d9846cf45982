"""PagedAttentionSpec: defaults, what it refuses, and what a refusal says."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from pa_compiler import PagedAttentionSpec

GOOD = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16, "dtype": "bfloat16"}

REFUSED = [  # field, bad value, error, what the message says besides the field and the value
    ("num_heads", 0, ValueError, "1"),
    ("num_heads", -32, ValueError, "1"),
    ("num_heads", 33, ValueError, "num_kv_heads.*8"),
    ("num_heads", 65544, ValueError, "1 to 65536"),
    ("num_heads", 4, ValueError, "num_kv_heads.*8"),
    ("num_heads", 32.0, TypeError, "int"),
    ("num_heads", "32", TypeError, "int"),
    ("num_heads", True, TypeError, "int"),
    ("num_heads", None, TypeError, "int"),
    ("num_kv_heads", 0, ValueError, "1"),
    ("num_kv_heads", 8.0, TypeError, "int"),
    ("num_kv_heads", 65537, ValueError, "1 to 65536"),
    ("head_dim", 0, ValueError, "1"),
    ("head_dim", -1, ValueError, "1"),
    ("head_dim", 1 << 40, ValueError, "1"),
    ("head_dim", 8193, ValueError, "1 to 8192"),
    ("head_dim", "128", TypeError, "int"),
    ("block_size", 0, ValueError, "1"),
    ("block_size", 65537, ValueError, "1 to 65536"),
    ("block_size", 16.5, TypeError, "int"),
    ("dtype", "float64", ValueError, "float32.*float16.*bfloat16"),
    ("dtype", "FLOAT16", ValueError, "float32.*float16.*bfloat16"),
    ("dtype", "", ValueError, "float32.*float16.*bfloat16"),
    ("dtype", None, TypeError, "string"),
    ("dtype", float, TypeError, "string"),
    ("out_dtype", "int8", ValueError, "float32.*float16.*bfloat16"),
    ("out_dtype", 32, TypeError, "string"),
    ("kv_layout", "NDH", ValueError, "NHD.*HND.*packed"),
    ("kv_layout", "nhd", ValueError, "NHD.*HND"),
    ("kv_layout", None, TypeError, "string"),
    ("head_tile", 0, ValueError, "1"),
    ("head_tile", 12, ValueError, "power of two"),
    ("head_tile", 2048, ValueError, "1024"),
    ("value_dim", 0, ValueError, "8192"),
    ("value_dim", 8193, ValueError, "8192"),
    ("value_dim", 64.0, TypeError, "int"),
    ("shared_kv", 1, TypeError, "bool"),
    ("alibi", 1, TypeError, "bool"),
    ("sinks", "yes", TypeError, "bool"),
    ("invariant", 1, TypeError, "bool"),
    ("window", 0, ValueError, "1073741824"),
    ("window", -1, ValueError, "1 to"),
    ("window", 2**30 + 1, ValueError, "1073741824"),
    ("window", 4.0, TypeError, "int"),
    ("softcap", 0.0, ValueError, "1e-30"),
    ("softcap", -5.0, ValueError, "1e-30"),
    ("softcap", 1e39, ValueError, "1e\\+30"),
    ("softcap", float("inf"), ValueError, "1e-30"),
    ("softcap", float("nan"), ValueError, "1e-30"),
    ("softcap", True, TypeError, "number"),
    ("softcap", "50", TypeError, "number"),
    ("head_tile", 16.0, TypeError, "int"),
    ("batch_chunk", 0, ValueError, "1"),
    ("batch_chunk", 1025, ValueError, "1024"),
    ("batch_chunk", "16", TypeError, "int"),
]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(("field", "value", "error", "says"), REFUSED, ids=[f"{f}={v}" for f, v, *_ in REFUSED])
def test_refused(figure, field, value, error, says):
    with pytest.raises(error, match=rf"^{field}\b.*{says}") as caught:
        PagedAttentionSpec(**{**GOOD, field: value})
    assert str(value) in str(caught.value)
    figure("kinds", 1)


def test_defaults():
    spec = PagedAttentionSpec(**GOOD)
    assert (spec.result_dtype, spec.kv_layout, spec.head_tile, spec.batch_chunk) == ("bfloat16", "NHD", 16, 16)
    assert spec.group == 4


def test_dtype_is_required():
    with pytest.raises(TypeError, match="dtype"):
        PagedAttentionSpec(32, 8, 128, 16)


def test_positional_order():
    spec = PagedAttentionSpec(6, 2, 80, 5, "float16", "float32", "HND", 8, 4)
    assert dataclasses.asdict(spec) == {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 80,
        "block_size": 5,
        "dtype": "float16",
        "out_dtype": "float32",
        "kv_layout": "HND",
        "head_tile": 8,
        "batch_chunk": 4,
        "value_dim": None,
        "shared_kv": False,
        "window": None,
        "softcap": None,
        "alibi": False,
        "sinks": False,
        "score_mod": None,
        "mask_mod": None,
        "inputs": (),
        "invariant": False,
        "kv_dtype": None,
        "kv_scale": None,
        "kv_rotation": None,
        "kv_dots": None,
    }


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("block_size", 8, "multiple of 16"), ("block_size", 24, "multiple of 16"), ("head_dim", 81, "even")],
)
def test_packed_refuses(figure, field, value, says):
    with pytest.raises(ValueError, match=rf"^{field}\b.*{says}.*packed.*{value}"):
        PagedAttentionSpec(**{**GOOD, field: value}, kv_layout="packed")
    assert PagedAttentionSpec(**{**GOOD, field: value})
    figure("kinds", 1)


def test_only_packed_bfloat16_needs_an_even_head_dim():
    for dtype in ("float32", "float16"):
        assert PagedAttentionSpec(4, 2, 81, 16, dtype, kv_layout="packed").packed_pair == 1


@pytest.mark.parametrize(
    ("kv_layout", "dtype", "key", "value"),
    [
        ("NHD", "bfloat16", (48, 2, 80), (48, 2, 80)),
        ("HND", "float16", (2, 48, 80), (2, 48, 80)),
        ("packed", "float32", (2, 80, 48), (2, 48, 80)),
        ("packed", "float16", (2, 80, 48), (2, 48, 80)),
        ("packed", "bfloat16", (2, 40, 96), (2, 24, 160)),
    ],
)
def test_cache_shapes(kv_layout, dtype, key, value):
    spec = PagedAttentionSpec(6, 2, 80, 48, dtype, kv_layout=kv_layout)
    assert spec.key_cache_shape == ("num_blocks", *key)
    assert spec.value_cache_shape == ("num_blocks", *value)


@pytest.mark.parametrize(
    ("kv_layout", "dtype", "value"),
    [
        ("NHD", "bfloat16", (48, 2, 33)),
        ("HND", "float16", (2, 48, 33)),
        ("packed", "float32", (2, 48, 33)),
        ("packed", "bfloat16", (2, 24, 66)),
    ],
)
def test_shape_of_values_of_another_size(kv_layout, dtype, value):
    spec = PagedAttentionSpec(6, 2, 80, 48, dtype, kv_layout=kv_layout, value_dim=33)
    assert spec.value_cache_shape == ("num_blocks", *value)
    assert spec.key_cache_shape == dataclasses.replace(spec, value_dim=None).key_cache_shape


def test_value_dim_follows_head_dim_unless_it_was_given():
    follows, given = PagedAttentionSpec(**GOOD), PagedAttentionSpec(**GOOD, value_dim=GOOD["head_dim"])
    assert follows == given
    assert dataclasses.replace(follows, head_dim=64).result_dim == 64
    assert dataclasses.replace(given, head_dim=64).result_dim == GOOD["head_dim"]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"value_dim": 129}, "^value_dim: expected 1 to head_dim = 128 with shared_kv, got 129"),
        ({"kv_layout": "packed"}, "^shared_kv: expected False for kv_layout packed"),
    ],
)
def test_shared_kv_refuses(figure, changes, says):
    with pytest.raises(ValueError, match=says):
        PagedAttentionSpec(**{**GOOD, "shared_kv": True, **changes})
    figure("kinds", 1)


@pytest.mark.parametrize("field", GOOD)
def test_frozen(field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(PagedAttentionSpec(**GOOD), field, 1)


def test_equal_specs_are_one_key():
    spec = PagedAttentionSpec(**GOOD)
    same = PagedAttentionSpec(**GOOD, out_dtype="bfloat16")
    assert len({spec, same, dataclasses.replace(spec), pickle.loads(pickle.dumps(spec))}) == 1
    assert dataclasses.replace(spec, block_size=32) != spec


COPIES = {
    "itself": lambda spec: spec,
    "replace": dataclasses.replace,
    "pickle": lambda spec: pickle.loads(pickle.dumps(spec)),
    "deepcopy": copy.deepcopy,
    "asdict": lambda spec: PagedAttentionSpec(**dataclasses.asdict(spec)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_out_dtype_follows_dtype_unless_it_was_given(copied):
    follows, given = PagedAttentionSpec(**GOOD), PagedAttentionSpec(**GOOD, out_dtype="bfloat16")
    assert follows == given
    for dtype in ("float32", "float16"):
        assert dataclasses.replace(copied(follows), dtype=dtype).result_dtype == dtype
        assert dataclasses.replace(copied(given), dtype=dtype).result_dtype == "bfloat16"
        assert dataclasses.replace(copied(given), dtype=dtype, out_dtype=None).result_dtype == dtype


def test_the_text_of_a_spec_states_its_types():
    follows, given = PagedAttentionSpec(**GOOD), PagedAttentionSpec(**GOOD, out_dtype="bfloat16", value_dim=128)
    assert repr(follows) == repr(given)
    assert eval(repr(follows)) == follows
    assert "out_dtype='bfloat16'" in repr(follows)
    assert follows.stated() == given.stated() == dataclasses.asdict(given)


@pytest.mark.parametrize("field", ["num_heads", "num_kv_heads", "head_dim", "block_size", "head_tile", "batch_chunk"])
def test_one_is_the_least(field):
    ones = dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "block_size", "head_tile", "batch_chunk"), 1)
    assert getattr(PagedAttentionSpec(**ones, dtype="float32"), field) == 1
