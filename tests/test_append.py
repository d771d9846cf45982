"""append_kv: every layout and dtype against plain indexing, bit for bit, and what must stay as it was."""

from __future__ import annotations

import functools
import json
import mmap

import numpy as np
import pytest
import tvm
from dlpack import Exported
from fences import PROT_READ, PROT_WRITE, SIDES, fenced, run_in_child
from inputs import DTYPES, lay_out
from numpy.lib.stride_tricks import as_strided
from specs import SPECS
from test_arrays import as_numpy, as_torch
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec, backends, kernels, schedules
from pa_compiler.cpu import target
from pa_compiler.cpu import tiles as tiling

ALL_SPECS = {
    **SPECS,
    "packed_float32": PagedAttentionSpec(4, 2, 24, 32, "float32", kv_layout="packed"),
    "packed_bfloat16": PagedAttentionSpec(5, 5, 80, 16, "bfloat16", kv_layout="packed"),
}
MAP_NORESERVE = 0x4000

every_spec = pytest.mark.parametrize("spec", ALL_SPECS.values(), ids=ALL_SPECS)


@pytest.fixture(scope="module")
def cpu():
    return target.resolve(backends.normalize("llvm"))


def random_bits(spec, *shape, seed=0):
    """Any bits at all: NaNs of every kind, infinities, -0.0 and denormals are among them."""
    dtype = DTYPES[spec.dtype]
    count = int(np.prod(shape))
    return np.frombuffer(np.random.default_rng(seed).bytes(count * dtype.itemsize), dtype).reshape(shape).copy()


class Call:
    """The arguments of one append_kv, and what the caches have to be after it."""

    def __init__(self, spec, num_tokens, num_blocks=7, seed=0):
        rng = np.random.default_rng(seed)
        num_slots = num_blocks * spec.block_size
        self.key, self.value = random_bits(spec, 2, num_tokens, spec.num_kv_heads, spec.head_dim, seed=seed)
        # Both ends of the cache, slots that occur more than once if there are enough tokens, and every fourth skipped.
        self.slot_mapping = rng.integers(0, num_slots, num_tokens)
        self.slot_mapping[:2] = [0, num_slots - 1][:num_tokens]
        self.slot_mapping[3::4] = -1
        before = random_bits(spec, 2, num_slots, spec.num_kv_heads, spec.head_dim, seed=seed + 1)
        after = before.copy()
        for token, slot in enumerate(self.slot_mapping):
            if slot >= 0:
                after[:, slot] = self.key[token], self.value[token]
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.key_cache, self.value_cache = lay_out(spec, *before.reshape(2, *shape))
        self.expected = lay_out(spec, *after.reshape(2, *shape))

    @property
    def arguments(self):
        return self.key, self.value, self.key_cache, self.value_cache, self.slot_mapping

    def check(self, key_cache=None, value_cache=None):
        assert_same_bits(self.key_cache if key_cache is None else key_cache, self.expected[0])
        assert_same_bits(self.value_cache if value_cache is None else value_cache, self.expected[1])


KERNEL_CASES = [  # kv_layout, dtype, num_kv_heads, head_dim, block_size
    ("NHD", "float32", 5, 80, 1),
    ("NHD", "float16", 2, 7, 128),
    ("NHD", "bfloat16", 5, 80, 5),
    ("HND", "float32", 5, 80, 5),
    ("HND", "float16", 1, 128, 16),
    ("HND", "bfloat16", 2, 7, 1),
    ("packed", "float32", 5, 80, 16),
    ("packed", "float32", 1, 7, 128),
    ("packed", "float16", 5, 80, 48),
    ("packed", "bfloat16", 5, 80, 16),
    ("packed", "bfloat16", 1, 128, 128),
    ("packed", "bfloat16", 2, 6, 48),
]


@pytest.mark.parametrize(("layout", "dtype", "num_kv_heads", "head_dim", "block_size"), KERNEL_CASES)
def test_kernels(cpu, layout, dtype, num_kv_heads, head_dim, block_size):
    """Through TVM alone, some heads and then the others."""
    spec = PagedAttentionSpec(num_kv_heads, num_kv_heads, head_dim, block_size, dtype, kv_layout=layout)
    makers = kernels.append(spec)
    unscheduled = tvm.IRModule({maker.__name__: maker(spec) for maker in makers})
    scheduled = schedules.schedule(unscheduled, tiling.choose(spec, cpu, "fused"))
    executable = tvm.compile(scheduled, target=tvm.target.Target(json.loads(cpu.config)))
    call = Call(spec, 40)
    slots = tvm.runtime.tensor(call.slot_mapping)
    written = []
    names = [makers[0].__name__, makers[-1].__name__]
    for name, new, cache in zip(names, call.arguments[:2], call.arguments[2:4], strict=True):
        new, cache = (tvm.runtime.tensor(array.view(f"u{array.itemsize}")) for array in (new, cache))
        middle = num_kv_heads // 2
        for head_begin, num_heads in ((0, middle), (middle, num_kv_heads - middle)):
            executable[name](new, cache, slots, head_begin, num_heads)
        written.append(cache.numpy().view(call.key.dtype))
    call.check(*written)


@every_spec
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_module(compiled, spec, num_tokens):
    call = Call(spec, num_tokens)
    assert compiled(spec).append_kv(*call.arguments) is None
    call.check()


@every_spec
def test_the_last_of_equal_slots_stays_at_any_number_of_threads(compiled, spec):
    """Some thousand tokens on a few slots: more than one thread's share."""
    module = compiled(spec)
    num_tokens = 2 * (1 << 18) // (spec.num_kv_heads * spec.head_dim * DTYPES[spec.dtype].itemsize)
    for num_threads in (1, 2, 7):
        module.num_threads = num_threads
        call = Call(spec, num_tokens, num_blocks=2)
        module.append_kv(*call.arguments)
        call.check()
    module.num_threads = 2


@every_spec
def test_new_tokens_in_one_tensor_with_the_query(compiled, spec):
    call = Call(spec, 12)
    query = random_bits(spec, 12, spec.num_heads, spec.head_dim)
    qkv = np.concatenate([query, call.key, call.value], axis=1)[:, ::-1][:, ::-1]
    _, key, value = np.split(qkv, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
    compiled(spec).append_kv(key, value, call.key_cache, call.value_cache, call.slot_mapping)
    call.check()


def test_one_value_for_all_tokens(compiled):
    """Stride 0, and read-only by NumPy's rule."""
    spec = SPECS["float32"]
    call = Call(spec, 1)
    key, value = (np.broadcast_to(array, (3, *array.shape[1:])) for array in (call.key, call.value))
    compiled(spec).append_kv(key, value, call.key_cache, call.value_cache, np.array([0, -1, 0]))
    call.check()


def side_by_side(key_cache, value_cache, axis):
    """Both caches in one buffer, as one follows the other along an axis."""
    both = np.concatenate([key_cache, value_cache], axis=axis)
    return np.split(both, [key_cache.shape[axis]], axis=axis)


def block_by_block(key_cache, value_cache, axis=1):
    """Both caches in one buffer, whatever their blocks look like."""
    flat = np.stack([cache.reshape(len(cache), -1) for cache in (key_cache, value_cache)], axis=axis)
    key, value = np.moveaxis(flat, axis, 0)
    return key.reshape(key_cache.shape), value.reshape(value_cache.shape)


BLOCKS = {
    "one_cache_after_the_other": lambda key, value: block_by_block(key, value, axis=0),
    "block_beside_block": block_by_block,
    "value_first": lambda key, value: block_by_block(value, key)[::-1],
    "blocks_in_reverse": lambda key, value: [cache[::-1] for cache in block_by_block(key[::-1], value[::-1])],
    "every_other_block": lambda key, value: [np.repeat(cache, 2, axis=0)[::2] for cache in (key, value)],
}
ROWS = {
    "row_beside_row": lambda key, value: side_by_side(key, value, axis=3),
    "rows_of_a_head_or_slot_together": lambda key, value: side_by_side(key, value, axis=2),
}


@every_spec
@pytest.mark.parametrize("place", BLOCKS.values(), ids=BLOCKS)
def test_caches_in_one_buffer(compiled, spec, place):
    call = Call(spec, 40)
    key_cache, value_cache = place(call.key_cache, call.value_cache)
    compiled(spec).append_kv(call.key, call.value, key_cache, value_cache, call.slot_mapping)
    call.check(key_cache, value_cache)


@pytest.mark.parametrize("place", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec.kv_layout != "packed"], ids=str)
def test_caches_in_one_buffer_row_by_row(compiled, spec, place):
    call = Call(spec, 40)
    key_cache, value_cache = place(call.key_cache, call.value_cache)
    compiled(spec).append_kv(call.key, call.value, key_cache, value_cache, call.slot_mapping)
    call.check(key_cache, value_cache)


@every_spec
def test_blocks_in_one_buffer_that_overlap_by_an_element(compiled, spec):
    call = Call(spec, 1)
    size = call.key_cache[0].size
    room = np.zeros((7, 2 * size - 1), call.key_cache.dtype)
    key_cache = room[:, :size].reshape(call.key_cache.shape)
    value_cache = room[:, size - 1 :].reshape(call.value_cache.shape)
    assert np.shares_memory(room, key_cache)
    with pytest.raises(ValueError, match=r"^value_cache\b.*key_cache"):
        compiled(spec).append_kv(call.key, call.value, key_cache, value_cache, call.slot_mapping)
    assert not room.any()


@every_spec
def test_torch(compiled, spec):
    call = Call(spec, 12)
    tensors = [as_torch(array) for array in call.arguments]
    compiled(spec).append_kv(*tensors)
    call.check(as_numpy(tensors[2]), as_numpy(tensors[3]))


@every_spec
def test_dlpack(compiled, spec):
    call = Call(spec, 12)
    compiled(spec).append_kv(*(Exported(array, byte_offset=48) for array in call.arguments))
    call.check()


@every_spec
@pytest.mark.scorecard(11)
@pytest.mark.parametrize("side", SIDES)
def test_stays_inside_every_buffer(compiled, spec, side, count, figure):
    """What is only read lies in read-only pages too."""
    module = compiled(spec)

    def check(seed):
        call = Call(spec, seed % 41, num_blocks=1 + seed % 7, seed=seed)
        writable = (PROT_READ, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ)
        guarded = [fenced(array, side, may) for array, may in zip(call.arguments, writable, strict=True)]
        module.append_kv(*guarded)
        call.check(*guarded[2:4])

    cases = ((f"{spec}, seed {seed}", functools.partial(check, seed)) for seed in range(count(41, 300)))
    figure(f"calls of append_kv at the {side}", run_in_child(cases))


def test_no_blocks_and_all_tokens_skipped(compiled):
    for spec in ALL_SPECS.values():
        call = Call(spec, 3)
        caches = call.key_cache[:0], call.value_cache[:0]
        compiled(spec).append_kv(call.key, call.value, *caches, np.full(3, -1))


def far_apart(cache):
    """A copy of a cache in which the third block begins more than 2**31 elements after the first."""
    stride = ((1 << 30) + 8) * cache.itemsize
    region = mmap.mmap(-1, len(cache) * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    copy = as_strided(np.frombuffer(region, cache.dtype), cache.shape, (stride, *cache.strides[1:]))
    copy[...] = cache
    return copy


@pytest.mark.parametrize("name", ["float32", "bfloat16_HND", "packed_bfloat16"])
def test_offsets_over_32_bits(compiled, name):
    spec = ALL_SPECS[name]
    call = Call(spec, 40, num_blocks=3)
    key_cache, value_cache = far_apart(call.key_cache), far_apart(call.value_cache)
    compiled(spec).append_kv(call.key, call.value, key_cache, value_cache, call.slot_mapping)
    call.check(key_cache, value_cache)
