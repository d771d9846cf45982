"""value_dim and shared_kv in calls: shapes of out and values, and the one cache whose keys hold the values."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from cuda_driver import OnGpu
from dlpack import CUDA, Exported
from inputs import make_inputs
from refusals import LENGTHS, assert_refused, over
from refusals import SPEC as EQUAL
from tolerances import assert_close_to_oracle, assert_same_bits

NARROW = dataclasses.replace(EQUAL, value_dim=16)
SHARED = dataclasses.replace(EQUAL, value_dim=16, shared_kv=True)
"""6 heads of 24 over 2 kv heads, blocks of 8, float16; values of 16."""


@pytest.fixture
def narrow(compiled):
    return compiled(NARROW)


@pytest.fixture
def shared(compiled):
    return compiled(SHARED)


def decode_call(spec):
    """The arrays of a good call; those of values are None with shared_kv."""
    inputs = make_inputs(EQUAL, LENGTHS, spare_blocks=4, surplus=1)
    values = None if spec.shared_kv else np.ascontiguousarray(inputs.value_cache[..., : spec.result_dim])
    return types.SimpleNamespace(
        query=inputs.query,
        key_cache=inputs.key_cache,
        value_cache=values,
        block_table=inputs.block_table,
        context_lens=inputs.context_lens,
        out=np.full((len(LENGTHS), spec.num_heads, spec.result_dim), np.nan, np.float32),
        lse=inputs.lse,
    )


def append_call(spec):
    rng = np.random.default_rng(0)
    shape = (spec.num_kv_heads, spec.head_dim)
    key = rng.random((5, *shape)).astype(np.float16)
    key_cache = np.full((3, spec.block_size, *shape), np.nan, np.float16)
    value, value_cache = key[..., : spec.result_dim].copy(), key_cache[..., : spec.result_dim].copy()
    call = types.SimpleNamespace(key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    if spec.shared_kv:
        call.value = call.value_cache = None
    call.slot_mapping = np.array([0, 23, -1, 7, 8])
    return call


V, T = ValueError, TypeError

# id, spec, error, the argument at fault, what its message also has to show, the argument in place of a good call's one
BAD_DECODE = [
    ("value_dim", NARROW, V, "value_cache", "[num_blocks,8,2,16] [10,8,2,24]", lambda c: np.zeros_like(c.key_cache)),
    ("value_dim_less", NARROW, V, "value_cache", "16 15", lambda c: c.value_cache[..., :15]),
    ("value_none", NARROW, T, "value_cache", "NoneType", lambda c: None),
    ("key_of_value_dim", NARROW, V, "key_cache", "[num_blocks,8,2,24] 16", lambda c: c.key_cache[..., :16]),
    ("out_of_head_dim", NARROW, V, "out", "[4,6,16] [4,6,24]", lambda c: np.zeros((4, 6, 24), np.float32)),
    ("out_side_by_side", NARROW, V, "out", "[4,96] [4,144]", lambda c: np.zeros((4, 144), np.float32)),
    ("out_over_values", NARROW, V, "out", "value_cache", lambda c: over(c.value_cache, np.float32, c.out.shape)),
    ("value_given", SHARED, T, "value_cache", "None shared_kv [10,8,2,16]", lambda c: c.key_cache[..., :16]),
    ("the_keys_given", SHARED, T, "value_cache", "None shared_kv [10,8,2,24]", lambda c: c.key_cache),
    ("value_of_another_dtype", SHARED, T, "value_cache", "None shared_kv", lambda c: c.key_cache.view(np.int16)),
    ("value_list", SHARED, T, "value_cache", "None shared_kv", lambda c: [1, 2]),
    ("value_on_gpu", SHARED, T, "value_cache", "None shared_kv", lambda c: Exported(c.key_cache, device=CUDA)),
    ("keys_none", SHARED, T, "key_cache", "NoneType", lambda c: None),
    ("out_of_head_dim_shared", SHARED, V, "out", "[4,6,16] [4,6,24]", lambda c: np.zeros((4, 6, 24), np.float32)),
    ("out_over_keys", SHARED, V, "out", "key_cache", lambda c: over(c.key_cache, np.float32, c.out.shape)),
]

BAD_APPEND = [
    ("value_of_head_dim", NARROW, V, "value", "[5,2,16] [5,2,24]", lambda c: c.key),
    ("value_cache_of_head_dim", NARROW, V, "value_cache", "16 24", lambda c: np.zeros_like(c.key_cache)),
    ("value_none", NARROW, T, "value", "NoneType", lambda c: None),
    ("value_cache_none", NARROW, T, "value_cache", "NoneType", lambda c: None),
    ("values_in_the_keys", NARROW, V, "value_cache", "key_cache", lambda c: c.key_cache[..., :16]),
    ("value_given", SHARED, T, "value", "None shared_kv [5,2,16]", lambda c: c.key[..., :16]),
    ("value_cache_given", SHARED, T, "value_cache", "None shared_kv [3,8,2,16]", lambda c: c.key_cache[..., :16]),
    ("value_list", SHARED, T, "value", "None shared_kv", lambda c: [1, 2]),
    ("key_over_keys", SHARED, V, "key_cache", "key", lambda c: {"key": over(c.key_cache, np.float16, c.key.shape)}),
    ("slot_beyond", SHARED, IndexError, "slot_mapping", "24 0", lambda c: c.slot_mapping + 24),
]


def changed(call, argument, change):
    spoiled = change(call)
    return spoiled if isinstance(spoiled, dict) else {argument: spoiled}


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("spec", "error", "argument", "shows", "change"),
    [row[1:] for row in BAD_DECODE],
    ids=[row[0] for row in BAD_DECODE],
)
def test_decode_refuses(compiled, figure, spec, error, argument, shows, change):
    module, good = compiled(spec), decode_call(spec)
    wrong = changed(good, argument, change)
    arrays = [*vars(good).values(), *wrong.values()]
    assert_refused(lambda: module.decode(**{**vars(good), **wrong}), error, argument, shows, arrays)
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("spec", "error", "argument", "shows", "change"),
    [row[1:] for row in BAD_APPEND],
    ids=[row[0] for row in BAD_APPEND],
)
def test_append_kv_refuses(compiled, figure, spec, error, argument, shows, change):
    module, good = compiled(spec), append_call(spec)
    wrong = changed(good, argument, change)
    arrays = [*vars(good).values(), *wrong.values()]
    assert_refused(lambda: module.append_kv(**{**vars(good), **wrong}), error, argument, shows, arrays)
    figure("kinds", 1)


@pytest.mark.parametrize("spec", [NARROW, SHARED], ids=["narrow", "shared"])
def test_out_is_made_with_heads_of_value_dim(compiled, spec):
    module, call = compiled(spec), decode_call(spec)
    out, lse = module.decode(**vars(call))
    del call.out, call.lse
    made, made_lse = module.decode(**vars(call), return_lse=True)
    assert made.shape == (4, 6, 16)
    assert_same_bits(made, out)
    assert_same_bits(made_lse, lse)


def test_values_in_the_keys_are_a_view_of_them(narrow, shared):
    """Of their first elements; the other spec is given it as a cache of its own."""
    call = decode_call(SHARED)
    inputs = make_inputs(EQUAL, LENGTHS, spare_blocks=4, surplus=1)
    inputs = inputs.replace(value_cache=call.key_cache[..., : SHARED.result_dim])
    assert_close_to_oracle(NARROW, inputs, *shared.decode(**vars(call)))
    twice = vars(decode_call(NARROW)) | {"value_cache": inputs.value_cache}
    assert_close_to_oracle(NARROW, inputs, *narrow.decode(**twice))


def test_tensors_of_torch(shared):
    torch = pytest.importorskip("torch", reason="torch is not there: its tensors are not tried")
    call = vars(decode_call(SHARED))
    out, lse = shared.decode(**call)
    tensors = {name: None if array is None else torch.from_numpy(array) for name, array in call.items()}
    del tensors["out"], tensors["lse"]
    made, made_lse = shared.decode(**tensors, return_lse=True)
    assert_same_bits(made.numpy(), out)
    assert_same_bits(made_lse.numpy(), lse)
    with pytest.raises(
        TypeError, match=r"^value_cache: expected None, since the spec has shared_kv, got an array of shape"
    ):
        shared.decode(**tensors | {"value_cache": tensors["key_cache"]})
    appended = {
        name: None if array is None else torch.from_numpy(array) for name, array in vars(append_call(SHARED)).items()
    }
    shared.append_kv(**appended)
    assert torch.isfinite(appended["key_cache"]).sum() == 4 * 2 * 24
    keys, values = shared.empty_cache(2, like="torch")
    assert tuple(keys.shape) == (2, 8, 2, 24)
    assert values is None


def test_append_kv_writes_keys_alone(shared):
    call = append_call(SHARED)
    shared.append_kv(**vars(call))
    written = call.key_cache.reshape(24, 2, 24)
    assert_same_bits(written[[0, 23, 7, 8]], call.key[[0, 1, 3, 4]])
    assert np.isfinite(written).sum() == 4 * 2 * 24


def test_append_kv_writes_rows_of_both_sizes(narrow):
    call = append_call(NARROW)
    narrow.append_kv(**vars(call))
    for cache, new in ((call.key_cache, call.key), (call.value_cache, call.value)):
        assert_same_bits(cache.reshape(24, *new.shape[1:])[[0, 23, 7, 8]], new[[0, 1, 3, 4]])
        assert np.isfinite(cache).sum() == 4 * new[0].size


def test_caches_that_are_made(narrow, shared):
    keys, values = narrow.empty_cache(3)
    assert (keys.shape, values.shape) == ((3, 8, 2, 24), (3, 8, 2, 16))
    keys, values = shared.empty_cache(3)
    assert keys.shape == (3, 8, 2, 24)
    assert values is None


ON_GPU = dataclasses.replace(EQUAL, head_dim=64, value_dim=32, shared_kv=True)


def test_a_gpu_refuses_a_cache_of_values(gpu, gpu_module):
    module = gpu_module(ON_GPU)
    call = OnGpu(gpu, make_inputs(ON_GPU, LENGTHS))
    with pytest.raises(TypeError, match=r"^value_cache: expected None, since the spec has shared_kv, got "):
        call.decode(module, value_cache=call.tensors["key_cache"])
    gpu.run()
    assert gpu.launches() == []
