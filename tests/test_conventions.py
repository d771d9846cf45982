"""Indices of int32 or int64, each by itself, and scale and out as engines have them: without a copy in Python."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from inputs import INT32, make_inputs
from refusals import SPEC, decode_call
from specs import SPECS, every_pipeline
from test_append import ALL_SPECS, Call
from test_arrays import as_torch
from tolerances import assert_same_bits

from pa_compiler import reference

LENGTHS = [0, 1, 8, 2500, 9, 0, 37]
INTEGERS = (np.int32, np.int64)

every_pair = pytest.mark.parametrize("dtypes", list(itertools.product(INTEGERS, INTEGERS)), ids=str)


def far_off(table, lengths, block_size, rng):
    """A table of int64 whose surplus entries are anything, and which is a view of a wider one."""
    wide = rng.integers(-(2**63), 2**63 - 1, (table.shape[0], table.shape[1] + 5), np.int64, endpoint=True)
    view = wide[:, 2 : 2 + table.shape[1]]
    used = np.arange(table.shape[1]) < -(-lengths // block_size)[:, None]
    view[used] = table[used]
    return view


@every_pipeline
@every_pair
@pytest.mark.parametrize("name", ["float32", "bfloat16_HND"])
def test_decode(compiled, name, pipeline, dtypes):
    """The same bits, at any number of threads, in views with anything in surplus entries."""
    spec = SPECS[name]
    module, inputs = compiled(spec, pipeline), make_inputs(spec, LENGTHS)
    expected = module.decode(*inputs.arguments, return_lse=True)
    table, lengths = inputs.block_table, inputs.context_lens.astype(dtypes[1])
    if dtypes[0] is np.int64:
        table = far_off(table, inputs.context_lens, spec.block_size, np.random.default_rng(0))
    for num_threads in (1, 3):
        module.num_threads = num_threads
        found = module.decode(*inputs.replace(block_table=table, context_lens=lengths).arguments, return_lse=True)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    module.num_threads = 2
    assert table.dtype == dtypes[0]


@every_pair
def test_decode_of_torch(compiled, dtypes):
    inputs, module = make_inputs(SPEC, LENGTHS), compiled(SPEC)
    pairs = zip(("block_table", "context_lens"), dtypes, strict=True)
    changed = inputs.replace(**{name: getattr(inputs, name).astype(dtype) for name, dtype in pairs})
    out = module.decode(*map(as_torch, changed.arguments))
    assert_same_bits(out.numpy(), module.decode(*inputs.arguments))


@pytest.mark.parametrize("lengths", [[], [0, 0], [5]], ids=str)
def test_decode_of_little(compiled, lengths):
    inputs, module = make_inputs(SPEC, lengths, surplus=0), compiled(SPEC)
    table, context_lens = inputs.block_table.astype(np.int64), inputs.context_lens.astype(np.int64)
    found = module.decode(*inputs.replace(block_table=table, context_lens=context_lens).arguments)
    assert_same_bits(found, module.decode(*inputs.arguments))


def test_one_row_for_all_sequences(compiled):
    """A table of stride 0."""
    inputs, module = make_inputs(SPEC, [20]), compiled(SPEC)
    query, lengths = np.repeat(inputs.query, 3, axis=0), np.array([20, 9, 0], np.int64)
    table = np.broadcast_to(inputs.block_table, (3, inputs.block_table.shape[1]))
    caches = inputs.key_cache, inputs.value_cache
    expected = module.decode(query, *caches, table.copy(), lengths.astype(np.int32))
    long_table = np.broadcast_to(inputs.block_table.astype(np.int64), table.shape)
    assert_same_bits(module.decode(query, *caches, table, lengths), expected)
    assert_same_bits(module.decode(query, *caches, long_table, lengths), expected)


def test_a_cache_of_more_blocks_than_int32_counts(compiled):
    """Block ids are of 32 bits: those beyond are out of range by name. The cache's blocks are all one."""
    inputs, module = make_inputs(SPEC, [5], spare_blocks=0), compiled(SPEC)
    endless = [np.broadcast_to(cache, (1 << 33, *cache.shape[1:])) for cache in (inputs.key_cache, inputs.value_cache)]
    expected = module.decode(*inputs.arguments)
    for block, fits in ((INT32.max, True), (1 << 31, False), (1 << 32, False)):
        arguments = inputs.query, *endless, np.array([[block]]), inputs.context_lens
        if fits:
            assert_same_bits(module.decode(*arguments), expected)
        else:
            with pytest.raises(IndexError, match=rf"^block_table: .*\[0, 2147483648\), got {block} for sequence 0"):
                module.decode(*arguments)


@every_pipeline
def test_plan(compiled, pipeline):
    module = compiled(SPECS["float32"], pipeline)
    lengths = np.array([2049, 0, 1, 5000, 17])
    expected = module.plan(lengths.astype(np.int32))
    assert module.plan(lengths) == expected
    assert module.plan(as_torch(lengths)) == expected
    for bad in (-1, 2**32 + 5, -(2**63), (1 << 30) + 1):
        with pytest.raises(ValueError, match=rf"^context_lens: .*for sequence 1, got {bad}$"):
            module.plan(np.array([3, bad]))


@pytest.mark.parametrize("name", ["float32", "bfloat16_HND", "packed_bfloat16"])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_append_kv(compiled, name, num_tokens):
    spec = ALL_SPECS[name]
    call = Call(spec, num_tokens)
    compiled(spec).append_kv(*call.arguments[:4], call.slot_mapping.astype(np.int32))
    call.check()


def test_the_reference_takes_them():
    call = decode_call()
    arguments = call.query, call.key_cache, call.value_cache
    expected = reference.decode(*arguments, call.block_table, call.context_lens, 0.25)
    longs = call.block_table.astype(np.int64), call.context_lens.astype(np.int64)
    for scale in (np.float32(0.25), np.array(0.25), as_torch(np.array(0.25))):
        assert_same_bits(reference.decode(*arguments, *longs, scale), expected)


SCALES = {
    "int": lambda: 1,
    "numpy_scalar": lambda: np.float32(1),
    "bfloat16_scalar": lambda: ml_dtypes.bfloat16(1),
    "array": lambda: np.array(1.0),
    "array_of_float16": lambda: np.array(1, np.float16),
    "array_of_bfloat16": lambda: np.array(1, ml_dtypes.bfloat16),
    "array_of_int": lambda: np.array(1),
    "tensor": lambda: as_torch(np.array(1.0, np.float32)),
    "tensor_of_int": lambda: as_torch(np.array(1)),
    "tensor_of_bfloat16": lambda: as_torch(np.array(1, ml_dtypes.bfloat16)),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scale(compiled, scale):
    call, again = decode_call(), decode_call()
    compiled(SPEC).decode(**vars(call) | {"scale": 1.0})
    compiled(SPEC).decode(**vars(again) | {"scale": scale()})
    assert_same_bits(again.out, call.out)


@every_pipeline
@pytest.mark.parametrize("kind", [lambda array: array, as_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", ["float32", "bfloat16_HND", "float32_MQA"])
def test_out_with_its_heads_side_by_side(compiled, name, pipeline, kind):
    """Written and returned as it is given, also inside of a wider array; nothing beside it is touched."""
    spec = SPECS[name]
    inputs, module = make_inputs(spec, LENGTHS), compiled(spec, pipeline)
    expected = module.decode(*inputs.arguments)
    room = np.zeros((len(LENGTHS), spec.num_heads * spec.head_dim + 6), inputs.out_dtype)
    out = kind(room)[:, 2:-4]
    assert module.decode(*map(kind, inputs.arguments), out=out) is out
    assert_same_bits(room[:, 2:-4].reshape(expected.shape), expected)
    assert not room[:, :2].any()
    assert not room[:, -4:].any()
