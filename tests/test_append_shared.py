"""append_kv into caches that have blocks in common: good where no slot that is written is one of both."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import DTYPES, make_inputs
from numpy.lib.stride_tricks import as_strided
from test_append import ALL_SPECS, Call, every_spec
from test_arrays import as_torch
from tolerances import assert_same_bits

from pa_compiler import reference

LAYERS = 3


def block_bytes(spec):
    return spec.block_size * spec.num_kv_heads * spec.head_dim * DTYPES[spec.dtype].itemsize


def pages_of(storage, spec, first, count, step=1):
    """Caches of `count` blocks in a storage of pages, every step-th of it from `first` on; values a page further."""
    caches = []
    for begin, shape in ((first, spec.key_cache_shape), (first + 1, spec.value_cache_shape)):
        pages = storage[begin : begin + (count - 1) * step + 1 : step]
        caches.append(pages.view(DTYPES[spec.dtype]).reshape(count, *shape[1:]))
    return caches


def storage_for(spec, num_blocks):
    """Pages for the keys and values of all layers, 2 * LAYERS for each block."""
    return np.zeros((2 * LAYERS * num_blocks, block_bytes(spec)), np.uint8)


@every_spec
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_pages_of_all_layers_in_one_storage(compiled, spec, dtype):
    """As transformers keeps them: block ids go in steps of 2 * layers, and values lie one page behind their keys."""
    module, storage = compiled(spec), storage_for(spec, 7)
    calls = [Call(spec, 40, seed=layer) for layer in range(LAYERS)]
    for layer, call in enumerate(calls):
        own = pages_of(storage, spec, 2 * layer, 7, step=2 * LAYERS)
        own[0][...], own[1][...] = call.key_cache, call.value_cache
    for layer, call in enumerate(calls):
        key_cache, value_cache = pages_of(storage, spec, 0, len(storage) - 1)
        assert np.shares_memory(key_cache[1], value_cache[0])
        block, slot = np.divmod(call.slot_mapping, spec.block_size)
        slots = (block * 2 * LAYERS + 2 * layer) * spec.block_size + slot
        slots = np.where(call.slot_mapping < 0, -1, slots).astype(dtype)
        module.append_kv(call.key, call.value, key_cache, value_cache, slots)
    for layer, call in enumerate(calls):
        call.check(*pages_of(storage, spec, 2 * layer, 7, step=2 * LAYERS))


@every_spec
def test_views_of_every_so_many_pages(compiled, spec):
    """The spans of such caches overlap, and no byte is of both."""
    module, storage = compiled(spec), storage_for(spec, 7)
    for layer in range(LAYERS):
        call = Call(spec, 40, seed=layer)
        caches = pages_of(storage, spec, 2 * layer, 7, step=2 * LAYERS)
        caches[0][...], caches[1][...] = call.key_cache, call.value_cache
        module.append_kv(call.key, call.value, *map(as_torch, caches), call.slot_mapping)
        call.check(*caches)


def shifted(spec, call, by):
    """A storage of zeros, and views of it as caches: block u of the values is block u + by of the keys."""
    count = len(call.key_cache)
    storage = np.zeros((count + abs(by), block_bytes(spec)), np.uint8)
    begins = max(0, -by), max(0, by)
    caches = [
        storage[begin : begin + count].view(DTYPES[spec.dtype]).reshape(cache.shape)
        for begin, cache in zip(begins, (call.key_cache, call.value_cache), strict=True)
    ]
    return storage, caches


@every_spec
@pytest.mark.parametrize("by", [-6, -2, -1, 1, 3, 6])
def test_refused_where_slots_meet_and_nowhere_else(compiled, spec, by, count):
    """Random slots: of NHD and HND slot by slot, packed by blocks."""
    module, rng = compiled(spec), np.random.default_rng(abs(by))
    unit = spec.block_size if spec.kv_layout == "packed" else 1
    good = 0
    for _ in range(count(60, 600)):
        call = Call(spec, int(rng.integers(1, 5)))
        slots = rng.integers(-1, 7 * spec.block_size, len(call.key))
        storage, caches = shifted(spec, call, by)
        apart_storage, apart = shifted(spec, call, 7)
        used = slots[slots >= 0] // unit
        if set(used) & set(used + by * spec.block_size // unit):
            with pytest.raises(ValueError, match=r"^value_cache: expected memory apart from key_cache's in all slots"):
                module.append_kv(call.key, call.value, *caches, slots)
            assert not storage.any()
            continue
        module.append_kv(call.key, call.value, *caches, slots)
        module.append_kv(call.key, call.value, *apart, slots)
        expected = np.zeros_like(storage)
        expected[max(0, -by) :][:7] |= apart_storage[:7]
        expected[max(0, by) :][:7] |= apart_storage[7:]
        assert_same_bits(storage, expected)
        good += 1
    assert good > 10


@pytest.mark.parametrize("name", ["float32", "bfloat16_HND"])
@pytest.mark.parametrize("reverse", [False, True])
def test_slots_that_lie_otherwise_in_their_blocks(compiled, name, reverse):
    """The blocks of both caches are the same, their rows in another order: slots meet where their blocks do."""
    spec = ALL_SPECS[name]
    call = Call(spec, 2)
    _, (key_cache, value_cache) = shifted(spec, call, 2)
    slot_axis, head_axis = (1, 2) if spec.kv_layout == "NHD" else (2, 1)
    strides, row = list(value_cache.strides), value_cache.strides[3] * spec.head_dim
    strides[slot_axis] = row if spec.kv_layout == "NHD" else row * spec.num_kv_heads
    strides[head_axis] = row * spec.block_size if spec.kv_layout == "NHD" else row
    value_cache = as_strided(value_cache, value_cache.shape, strides)
    if reverse:
        key_cache, value_cache = key_cache[::-1], value_cache[::-1]
    module = compiled(spec)
    module.append_kv(call.key, call.value, key_cache, value_cache, np.array([0, 1]))
    for token in (0, 1):
        for cache, new in ((key_cache, call.key), (value_cache, call.value)):
            assert_same_bits(np.ascontiguousarray(cache[0].take(token, axis=slot_axis - 1)), new[token])
    with pytest.raises(ValueError, match=r"^value_cache: .* in the block of key_cache's slot"):
        module.append_kv(call.key, call.value, key_cache, value_cache, np.array([3, 5]) * spec.block_size)


def test_decode_of_such_pages(compiled):
    """Block tables in steps of 2 * layers, over pages of which those of the values are one further."""
    spec = ALL_SPECS["float32"]
    inputs = make_inputs(spec, [9, 0, 20, 7], poison="none")
    module, storage = compiled(spec), storage_for(spec, len(inputs.key_cache))
    own = pages_of(storage, spec, 2, len(inputs.key_cache), step=2 * LAYERS)
    own[0][...], own[1][...] = inputs.key_cache, inputs.value_cache
    table = np.where(inputs.block_table >= 0, inputs.block_table.astype(np.int64) * 2 * LAYERS + 2, -1)
    caches = pages_of(storage, spec, 0, len(storage) - 1)
    found = module.decode(inputs.query, *caches, table, inputs.context_lens)
    assert_same_bits(found, module.decode(*inputs.arguments))
    expected = reference.decode(*inputs.arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
