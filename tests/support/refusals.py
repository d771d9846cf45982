"""For the tests of bad arguments: good calls, what spoils an array, and how a refusal is told."""

from __future__ import annotations

import re
import types

import numpy as np
import pytest
from dlpack import Exported
from inputs import make_inputs
from numpy.lib.stride_tricks import as_strided

from pa_compiler import PagedAttentionSpec

SPEC = PagedAttentionSpec(num_heads=6, num_kv_heads=2, head_dim=24, block_size=8, dtype="float16", out_dtype="float32")
LENGTHS = [9, 0, 20, 7]  # 6 blocks in use and 4 spare: num_blocks is 10; max_blocks is 3 + 1, a capacity of 32 tokens


def strided(array):
    """The same values in every other element of a wider last axis."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


def misaligned(array):
    """The same values one byte off the element's alignment."""
    copy = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def with_byte_strides(array, *strides):
    """The same values in a room of their own, as large as strides in bytes reach."""
    reach = sum((extent - 1) * stride for extent, stride in zip(array.shape, strides, strict=True)) + array.itemsize
    spread = np.ndarray(array.shape, array.dtype, np.zeros(reach, np.uint8), strides=strides)
    spread[...] = array
    return spread


def with_at(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


def read_only(array):
    array.flags.writeable = False
    return array


def over(array, dtype, shape):
    """An array of dtype and shape in the memory of another one."""
    return np.ndarray(shape, dtype, array.data)


def far(array, stride):
    """An array whose first axis is said to have a stride of so many bytes."""
    return Exported(as_strided(array, strides=(stride, *array.strides[1:])))


def nowhere(array, offset=0):
    """An array of no memory, or what an offset in such a one makes of it."""
    return Exported(array, address=offset)


def decode_call():
    inputs = make_inputs(SPEC, LENGTHS, spare_blocks=4, surplus=1)
    names = ("query", "key_cache", "value_cache", "block_table", "context_lens")
    arrays = dict(zip(names, inputs.arguments, strict=True))
    return types.SimpleNamespace(**arrays, scale=None, out=inputs.out, lse=inputs.lse)


def append_call():
    rng = np.random.default_rng(0)
    key, value = rng.random((2, 5, 2, 24)).astype(np.float16)
    key_cache, value_cache = (np.full((3, 8, 2, 24), np.nan, np.float16) for _ in range(2))
    slot_mapping = np.array([0, 23, -1, 7, 8])
    return types.SimpleNamespace(
        key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping
    )


def bytes_of(arrays):
    return [array.tobytes() for array in arrays if isinstance(array, np.ndarray)]


def assert_refused(call, error, argument, shows, arrays):
    """A call raises an error that names the argument and shows both values, and not a byte of the arrays changes."""
    before = bytes_of(arrays)
    with pytest.raises(error, match=rf"^{argument}: expected .*\bgot\b") as caught:
        call()
    message = str(caught.value).replace(", ", ",")
    for value in shows.split():
        assert re.search(rf"(?<![\w-]){re.escape(value)}(?!\w)", message), f"{value!r} is not in {message!r}"
    assert bytes_of(arrays) == before
