"""What must not change a single bit: threads, neighbours, places in the cache, strides, alignment."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
from inputs import make_inputs
from specs import every_spec
from tolerances import assert_same_bits

LENGTHS = [5000, 0, 1, 17, 2048, 2049, 33, 40, 1, 129, 64, 250, 0, 7, 8, 9, 10, 4099, 3]


def decode(module, inputs):
    return module.decode(*inputs.arguments, out=inputs.out, lse=inputs.lse, return_lse=True)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@every_spec
@pytest.mark.scorecard(6)
def test_threads(compiled, spec, pipeline, count, figure):
    """Short sequences that share a work item, and long ones that are cut into ranges."""
    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS)
    module.num_threads = 1
    expected = decode(module, inputs)
    reruns = count(5, 100)
    for threads in (2, 3, 4, 8, 2, 1):
        module.num_threads = threads
        for _ in range(reruns):
            assert_same(decode(module, inputs), expected)
    figure("reruns", 6 * reruns)


@every_spec
@pytest.mark.scorecard(5)
@pytest.mark.parametrize("length", [0, 1, 37, 2500])
def test_alone_and_at_every_position(compiled, spec, pipeline, length, figure):
    """Of batches that end just before, at and after a chunk of 16."""
    module = compiled(spec, pipeline)
    inputs = make_inputs(spec, [*np.random.default_rng(3).integers(0, 70, 33), length])
    alone = decode(module, inputs.take([33]))
    for batch in (15, 16, 17, 31, 32, 33):
        for position in range(batch):
            order = np.arange(batch)
            order[position] = 33
            out, lse = decode(module, inputs.take(order))
            assert_same((out[position : position + 1], lse[position : position + 1]), alone)
        figure("positions", batch)


@every_spec
@pytest.mark.scorecard(4)
def test_places_of_blocks(compiled, spec, pipeline, count, figure):
    module = compiled(spec, pipeline)
    expected = decode(module, make_inputs(spec, LENGTHS, placement=0))
    relocations = count(19, 100)
    for placement in range(1, relocations + 1):
        moved = make_inputs(spec, LENGTHS, placement=placement, spare_blocks=placement % 20 * 7)
        assert_same(decode(module, moved), expected)
    figure("relocations", relocations)


def interleaved(inputs):
    """A block of keys beside a block of values."""
    key, value = inputs.key_cache, inputs.value_cache
    both = np.concatenate([array.reshape(len(array), -1) for array in (key, value)], axis=1)
    key_part, value_part = np.split(both, [key[0].size], axis=1)
    return inputs.replace(key_cache=key_part.reshape(key.shape), value_cache=value_part.reshape(value.shape))


def inside_larger(inputs):
    def inside(array):
        larger = np.full([extent + 4 for extent in array.shape], np.nan, array.dtype)
        view = larger[tuple(slice(1, extent + 1) for extent in array.shape)]
        view[...] = array
        return view

    return inputs.replace(key_cache=inside(inputs.key_cache), value_cache=inside(inputs.value_cache))


def one_layer_of_many(inputs):
    def layer(array):
        layers = np.full((array.shape[0], 3, *array.shape[1:]), np.nan, array.dtype)
        layers[:, 1] = array
        return layers[:, 1]

    return inputs.replace(key_cache=layer(inputs.key_cache), value_cache=layer(inputs.value_cache))


def slice_of_qkv(inputs):
    batch, heads, head_dim = inputs.query.shape
    qkv = np.full((batch, heads + 4, head_dim), np.nan, inputs.query.dtype)
    qkv[:, 2 : heads + 2] = inputs.query
    return inputs.replace(query=qkv[:, 2 : heads + 2])


def backwards(inputs):
    def reverse(array):
        return array[::-1].copy()[::-1]

    return inputs.replace(
        query=reverse(inputs.query), key_cache=reverse(inputs.key_cache), value_cache=reverse(inputs.value_cache)
    )


def wide_table(inputs):
    table = np.full((2 * len(inputs.block_table), inputs.block_table.shape[1] + 9), -1, np.int32)
    table[::2, 4:-5] = inputs.block_table
    return inputs.replace(block_table=table[::2, 4:-5])


def slots_swapped_with_heads(inputs):
    """The other kv layout's memory under this layout's shape."""
    return inputs.replace(
        key_cache=inputs.key_cache.swapaxes(1, 2).copy().swapaxes(1, 2),
        value_cache=inputs.value_cache.swapaxes(1, 2).copy().swapaxes(1, 2),
    )


VIEWS = (interleaved, inside_larger, one_layer_of_many, slice_of_qkv, backwards, wide_table, slots_swapped_with_heads)


@every_spec
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_strides(compiled, spec, pipeline, view):
    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS)
    assert_same(decode(module, view(inputs)), decode(module, inputs))


@every_spec
def test_strided_results(compiled, spec, pipeline):
    """out and lse inside larger arrays, of which the rest is left as it was."""
    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS)
    expected = decode(module, inputs)
    batch, heads, head_dim = inputs.query.shape
    larger_out = np.full((batch + 1, 2, heads + 1, head_dim + 3), 7, inputs.out_dtype)
    larger_lse = np.full((2 * batch, heads + 2), 7, np.float32)
    out, lse = larger_out[1:, 1, :-1, 2:-1], larger_lse[::2, 1:-1]
    module.decode(*inputs.arguments, out=out, lse=lse)
    assert_same((out, lse), expected)
    out[...], lse[...] = 7, 7
    assert (larger_out == 7).all()
    assert (larger_lse == 7).all()


@every_spec
@pytest.mark.parametrize("elements", [1, 3, 8])
def test_alignment(compiled, spec, pipeline, elements):
    """Arrays that start at a 64-byte line plus a few elements: NumPy promises no more than the element's alignment."""

    def shift(array):
        line = 64 // array.itemsize
        room = np.empty(array.size + 2 * line, array.dtype)
        start = -(room.ctypes.data // array.itemsize) % line + elements
        room[start : start + array.size] = array.reshape(-1)
        return room[start : start + array.size].reshape(array.shape)

    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS)
    expected = decode(module, inputs)
    out, lse = shift(inputs.out), shift(inputs.lse)
    assert (out.ctypes.data - elements * out.itemsize) % 64 == 0
    module.decode(*(shift(array) for array in inputs.arguments), out=out, lse=lse)
    assert_same((out, lse), expected)


def sparse(shape, dtype):
    """Zeros that take memory only where they are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module names from Python 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags), dtype).reshape(shape)


@every_spec
@pytest.mark.scorecard(12)
@pytest.mark.parametrize("one_buffer", [True, False], ids=["one_buffer", "two_buffers"])
def test_cache_of_more_than_2_to_the_31_elements(compiled, spec, pipeline, one_buffer, figure):
    """The same data at the bottom and at the top of sparse mappings; where a 32-bit offset wraps to, there is 0.

    In one buffer, block beside block, it is 2^32 elements.
    """
    module, small = compiled(spec, pipeline), make_inputs(spec, [100, 33, 16], spare_blocks=0)
    expected = decode(module, small)
    caches = (small.key_cache, small.value_cache)
    used, size = len(small.key_cache), small.key_cache[0].size
    num_blocks = (1 << 31) // size + 1000
    if one_buffer:
        large = np.moveaxis(sparse((num_blocks, 2, size), small.key_cache.dtype), 1, 0)
    else:
        large = [sparse((num_blocks, size), cache.dtype) for cache in caches]
    key_cache, value_cache = (flat.reshape(-1, *cache.shape[1:]) for flat, cache in zip(large, caches, strict=True))
    for first in (0, num_blocks - used):
        key_cache[first : first + used], value_cache[first : first + used] = caches
        table = (small.block_table % used + first).astype(np.int32)  # surplus entries turn into some block, unread
        moved = small.replace(key_cache=key_cache, value_cache=value_cache, block_table=table)
        assert_same(decode(module, moved), expected)
        key_cache[first : first + used] = value_cache[first : first + used] = 0
    figure("elements of the largest cache", num_blocks * size * (1 + one_buffer), worst=True)
    figure("comparisons", 2)


@every_spec
@pytest.mark.scorecard(12)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_more_than_2_to_the_31_elements(compiled, spec, pipeline, axis, figure):
    """Blocks, and slots or heads within them, so far apart that no offset between two fits into 32 bits."""

    def far_apart(array):
        stride = (1 << 31) + 8
        room = sparse((array.shape[axis] * stride,), array.dtype)
        order = [axis, *(other for other in range(4) if other != axis)]
        inner = array.transpose(order).copy()
        strides = [stride * array.itemsize, *inner.strides[1:]]
        view = np.lib.stride_tricks.as_strided(room, inner.shape, strides).transpose(np.argsort(order))
        view[...] = array
        return view

    module, small = compiled(spec, pipeline), make_inputs(spec, [16, 7], spare_blocks=0)
    expected = decode(module, small)
    far = small.replace(key_cache=far_apart(small.key_cache), value_cache=far_apart(small.value_cache))
    assert_same(decode(module, far), expected)
    figure("comparisons", 1)
