"""append_kv and the checks of indices on CUDA, run on the emulator."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cuda_kernels import aligned, build_others, cache_strides, strides
from inputs import DTYPES
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda.kernels.check import BAD_BLOCK, BAD_LENGTH, BAD_SLOT, VIOLATION

SPECS = {
    "NHD": PagedAttentionSpec(6, 3, 48, 5, "bfloat16"),
    "HND": PagedAttentionSpec(8, 2, 64, 16, "float32", kv_layout="HND"),
    "longer_keys": PagedAttentionSpec(6, 3, 192, 5, "float16", kv_layout="HND", value_dim=128),
    "longer_values": PagedAttentionSpec(6, 3, 16, 16, "bfloat16", value_dim=80),
    "shared": PagedAttentionSpec(8, 2, 48, 5, "bfloat16", value_dim=32, shared_kv=True),
}
NUM_BLOCKS = 40

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(scope="module")
def kernels(emulated):
    return functools.cache(functools.partial(build_others, emulated))


def random_bits(spec, *shape, seed=0):
    """Any bits at all: NaNs of every kind are among them."""
    dtype = DTYPES[spec.dtype]
    bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return aligned(np.frombuffer(bits, f"u{dtype.itemsize}").reshape(shape))


def append(kernels, spec, slots, *, status=0, order="forward"):
    """(key and value, caches before, caches after) of one append_kv of tokens to slots; of keys alone where shared."""
    num_tokens, heads = len(slots), spec.num_kv_heads
    both = random_bits(spec, num_tokens, heads * (spec.head_dim + spec.result_dim))  # in one array, as from qkv
    key, value = np.split(both, [heads * spec.head_dim], axis=1)
    key, value = key.reshape(num_tokens, heads, -1), value.reshape(num_tokens, heads, -1)
    shapes = (spec.key_cache_shape, spec.value_cache_shape)
    before = [random_bits(spec, NUM_BLOCKS, *shape[1:], seed=seed) for seed, shape in enumerate(shapes, 1)]
    after = [aligned(cache) for cache in before]
    arguments = {
        "key": key,
        "value": value,
        "key_cache": after[0],
        "value_cache": after[1],
        "slot_mapping": np.asarray(slots, np.int64),
        "status": np.array([status], np.int32),
        "report": np.zeros(5, np.int64),
        "num_blocks": NUM_BLOCKS,
        "num_tokens": num_tokens,
        **strides(key, key_token=0, key_head=1),
        **strides(value, value_token=0, value_head=1),
        **cache_strides(spec, "k", after[0]),
        **cache_strides(spec, "v", after[1]),
    }
    kernels(spec).launch("cuda_append_kv", arguments, order)
    if spec.shared_kv:
        assert_same_bits(after[1], before[1])
        return [key], before[:1], after[:1]
    return [key, value], before, after


def rows(spec, cache):
    """A view of [blocks, slots, heads, head_dim]."""
    return cache if spec.kv_layout == "NHD" else cache.swapaxes(1, 2)


@every_spec
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 600])
def test_append(kernels, spec, num_tokens, order):
    """Both ends of the caches, slots that occur again near and far, every fourth token skipped."""
    num_slots = NUM_BLOCKS * spec.block_size
    slots = np.random.default_rng(num_tokens).integers(0, num_slots, num_tokens)
    slots[:2] = [0, num_slots - 1][:num_tokens]
    slots[3::4] = -1
    for new, cache, actual in zip(*append(kernels, spec, slots, order=order), strict=True):
        for token, slot in enumerate(slots):
            if slot >= 0:
                rows(spec, cache)[slot // spec.block_size, slot % spec.block_size] = new[token]
        assert_same_bits(actual, cache)


@every_spec
def test_the_last_of_equal_slots_stays(kernels, spec):
    news, _, after = append(kernels, spec, np.full(300, 7))
    for new, cache in zip(news, after, strict=True):
        assert_same_bits(rows(spec, cache)[7 // spec.block_size, 7 % spec.block_size], new[-1])


@every_spec
def test_a_status_stops_append(kernels, spec):
    _, before, after = append(kernels, spec, [3, 4], status=VIOLATION - BAD_SLOT)
    for cache, actual in zip(before, after, strict=True):
        assert_same_bits(actual, cache)


def check(kernels, spec, context_lens, block_table, num_blocks=NUM_BLOCKS):
    """The status that cuda_check leaves."""
    status = np.zeros(1, np.int32)
    arguments = {
        "block_table": np.asarray(block_table, np.int32),
        "context_lens": np.asarray(context_lens, np.int32),
        "status": status,
        "batch": len(context_lens),
        "max_blocks": len(block_table[0]),
        "num_blocks": num_blocks,
        "table_seq": len(block_table[0]),
        "row_starts": np.zeros(1, np.int32),
        "row_step": 0,
        "num_entries": 0,
    }
    kernels(spec).launch("cuda_check", arguments)
    return int(status[0])


@pytest.mark.parametrize(
    ("context_lens", "block_table", "expected"),
    [
        ([5, 0, 10], [[39, -1], [77, 40], [0, 3]], None),  # what is not used may be anything
        ([6, 5], [[0, 40], [0, 0]], (0, BAD_BLOCK)),
        ([5, 5], [[0, 40], [-1, 0]], (1, BAD_BLOCK)),
        ([5, 11, 5], [[0, 0]] * 3, (1, BAD_LENGTH)),
        ([5, -1, 11], [[0, 0]] * 3, (1, BAD_LENGTH)),
        ([5, 10, 11], [[0, 0], [0, 2**31 - 1], [-5, 0]], (1, BAD_BLOCK)),  # the first of those that are wrong
    ],
)
def test_check(kernels, context_lens, block_table, expected):
    status = check(kernels, SPECS["NHD"], context_lens, block_table)
    assert status == (0 if expected is None else VIOLATION - (2 * expected[0] + expected[1]))


def test_check_of_a_long_table(kernels):
    table = np.zeros((1, 1000), np.int32)
    assert check(kernels, SPECS["NHD"], [5000], table) == 0
    table[0, 999] = NUM_BLOCKS
    assert check(kernels, SPECS["NHD"], [4995], table) == 0
    assert check(kernels, SPECS["NHD"], [4996], table) == VIOLATION - BAD_BLOCK


@pytest.mark.parametrize(("slot", "wrong"), [(199, False), (200, True), (-1, False), (2**40, True)])
def test_check_slots(kernels, slot, wrong):
    slots = np.zeros(200, np.int64)
    slots[150] = slot
    status = np.zeros(1, np.int32)
    arguments = {"slot_mapping": slots, "status": status, "num_tokens": 200, "num_blocks": NUM_BLOCKS}
    kernels(SPECS["NHD"]).launch("cuda_check_slots", arguments)
    assert status[0] == (VIOLATION - (2 * 150 + BAD_SLOT) if wrong else 0)
