"""The CUDA kernels, run by the emulator on the CPU, against the float64 oracle."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cuda_calls import EmulatedModule
from cuda_emulator import ORDERS, EmulationError
from inputs import POISONS, make_inputs
from test_append import Call, far_apart
from test_invariance import sparse
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.kernels.cuda_check import BAD_BLOCK, BAD_LENGTH, BAD_SLOT, VIOLATION

SPECS = {  # every group up to 16; head sizes, block sizes, types and layouts take turns
    "group_1": PagedAttentionSpec(2, 2, 128, 16, "bfloat16"),
    "group_2": PagedAttentionSpec(4, 2, 64, 1, "float16", "float32"),
    "group_3": PagedAttentionSpec(3, 1, 64, 5, "bfloat16", "float32", kv_layout="HND"),
    "group_4": PagedAttentionSpec(8, 2, 128, 16, "bfloat16"),
    "group_5": PagedAttentionSpec(5, 1, 256, 8, "float16"),
    "group_6": PagedAttentionSpec(12, 2, 64, 32, "bfloat16", "float32", kv_layout="HND"),
    "group_7": PagedAttentionSpec(7, 1, 80, 1, "bfloat16"),
    "group_8": PagedAttentionSpec(8, 1, 128, 5, "float16", "float32"),
    "group_12": PagedAttentionSpec(12, 1, 256, 16, "bfloat16", "float32"),
    "group_16": PagedAttentionSpec(16, 1, 64, 32, "float16", "bfloat16", kv_layout="HND"),
    "group_20": PagedAttentionSpec(20, 1, 16, 8, "bfloat16", "float16"),
    "float32_group_1": PagedAttentionSpec(3, 3, 64, 16, "float32", kv_layout="HND"),
    "float32_group_5": PagedAttentionSpec(10, 2, 128, 1, "float32", "bfloat16"),
    "float32_group_16": PagedAttentionSpec(16, 1, 32, 16, "float32"),
}
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 300, 0, 777]

every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def module_of(emulated):
    """module_of(name of a spec) -> EmulatedModule, the same one each time."""
    return functools.cache(lambda name: EmulatedModule(SPECS[name], emulated))


def check(module, inputs, scale=None, **options):
    out, lse = module.decode(inputs, scale, **options)
    assert module.status[0] == 0
    assert_close_to_oracle(module.spec, inputs, out, lse, scale)
    return out, lse


def check_all_lengths(module):
    """Empty, short and long sequences, with each poison in all that is not used; the same bits in either order."""
    inputs = make_inputs(module.spec, LENGTHS)
    out, lse = check(module, inputs)
    for array, expected in zip(module.decode(inputs, order="reverse"), (out, lse), strict=True):
        assert_same_bits(array, expected)
    for seed, (poison, extra) in enumerate(zip(POISONS, (1, 2, 7, 40, 1, 3), strict=True)):
        lengths = np.random.default_rng(seed).integers(0, 130, 1 + 7 * seed)
        check(module, make_inputs(module.spec, lengths, seed=seed, poison=poison), extra=extra)


@pytest.mark.parametrize("name", SPECS)
def test_spec(module_of, name):
    check_all_lengths(module_of(name))


@pytest.mark.parametrize("name", ["group_12", "float32_group_5"])
def test_less_shared_memory(emulated, name):
    """Of a GPU on which fewer warps and stages fit."""
    module, larger = EmulatedModule(SPECS[name], emulated, "sm_86"), EmulatedModule(SPECS[name], emulated)
    assert module.launches["cuda_decode"].shared_bytes < larger.launches["cuda_decode"].shared_bytes
    check_all_lengths(module)


@pytest.mark.parametrize("scale", [1.0, -0.25, 0.0, 10.0])
def test_scale(module_of, scale):
    module = module_of("group_4")
    check(module, make_inputs(module.spec, [100, 7, 300]), scale)


def spread(array, *gaps):
    """A view of the same elements, each axis so many elements further apart than it need be, with NaNs between."""
    shape = [length + gap for length, gap in zip(array.shape, gaps, strict=True)]
    room = np.full(shape, np.nan if array.dtype.kind != "i" else -9, array.dtype)
    view = room[tuple(slice(0, length) for length in array.shape)]
    view[...] = array
    return view


@pytest.mark.parametrize("name", ["group_3", "group_4", "float32_group_5"])
def test_strides(module_of, name):
    """Keys and values at any multiple of 16 bytes, the query of 4."""
    module = module_of(name)
    inputs = make_inputs(module.spec, LENGTHS)
    expected = module.decode(inputs)
    moved = inputs.replace(
        query=spread(inputs.query, 1, 3, 6),
        key_cache=spread(inputs.key_cache, 1, 2, 1, 8),
        value_cache=spread(inputs.value_cache, 0, 1, 3, 24),
        block_table=spread(inputs.block_table, 1, 5),
    )
    into = spread(inputs.out, 2, 1, 5), spread(inputs.lse, 1, 3)
    module.decode(moved, into=into)
    for array, same in zip(into, expected, strict=True):
        assert_same_bits(array, same)
        assert np.isnan(array.base).sum() == array.base.size - array.size, "something else was written"


@pytest.mark.parametrize("name", ["group_3", "group_4", "float32_group_5"])
def test_cache_of_more_than_2_to_the_31_elements(module_of, name):
    """The same data at the bottom and at the top of sparse mappings."""
    module = module_of(name)
    large, small = at_the_top(module.spec)
    for array, same in zip(module.decode(large), module.decode(small), strict=True):
        assert_same_bits(array, same)


def at_the_top(spec):
    """Inputs whose blocks are the last of a huge cache, and the same in a small one."""
    small = make_inputs(spec, [100, 33, 16], spare_blocks=0)
    used, size = len(small.key_cache), small.key_cache[0].size
    num_blocks = (1 << 31) // size + 1000
    caches = [sparse((num_blocks, *cache.shape[1:]), cache.dtype) for cache in (small.key_cache, small.value_cache)]
    for cache, data in zip(caches, (small.key_cache, small.value_cache), strict=True):
        cache[-used:] = data
    table = (small.block_table % used + num_blocks - used).astype(np.int32)
    return small.replace(key_cache=caches[0], value_cache=caches[1], block_table=table), small


@every_order
@pytest.mark.parametrize("name", ["group_2", "group_3", "group_20", "float32_group_1"])
@pytest.mark.parametrize("num_tokens", [1, 5, 400])
def test_append(module_of, name, num_tokens, order):
    module = module_of(name)
    call = Call(module.spec, num_tokens)
    module.append_kv(*call.arguments, order=order)
    assert module.status[0] == 0
    call.check()


def test_append_over_32_bits(module_of):
    module = module_of("group_4")
    call = Call(module.spec, 40, num_blocks=3)
    caches = far_apart(call.key_cache), far_apart(call.value_cache)
    module.append_kv(call.key, call.value, *caches, call.slot_mapping)
    call.check(*caches)


@pytest.mark.parametrize("name", ["group_1", "group_4"])
@pytest.mark.parametrize(
    ("sequence", "length", "block", "kind"),
    [(2, -1, 0, BAD_LENGTH), (1, 1 << 20, 0, BAD_LENGTH), (4, 200, -1, BAD_BLOCK), (0, 33, 1000, BAD_BLOCK)],
)
def test_bad_index(module_of, name, sequence, length, block, kind):
    """The status word names the sequence and what is wrong, and nothing is written."""
    module = module_of(name).edited("\\Z", "\n")  # with a status of its own
    inputs = make_inputs(module.spec, [200] * 5)
    inputs.context_lens[sequence] = length
    inputs.block_table[sequence, min(max(length - 1, 0) // 16, 12)] = block
    out, lse = module.decode(inputs)
    assert module.status[0] == VIOLATION - (2 * sequence + kind)
    assert np.isnan(out.astype(np.float32)).all()
    assert np.isnan(lse).all()


def test_bad_slot(module_of):
    module = module_of("group_4").edited("\\Z", "\n")
    call = Call(module.spec, 300)
    before = call.key_cache.copy(), call.value_cache.copy()
    call.slot_mapping[[200, 240]] = 7 * 16
    module.append_kv(*call.arguments)
    assert module.status[0] == VIOLATION - (2 * 200 + BAD_SLOT)
    assert_same_bits(call.key_cache, before[0])
    assert_same_bits(call.value_cache, before[1])


FAULTS = {  # name: (spec, pattern, replacement, what finds it)
    "waits_for_too_few": ("group_4", r"wait_group 1;", "wait_group 2;", "cp.async of thread [0-9]+ is in flight"),
    "waits_for_too_few_fma": ("group_1", r"wait_group 1;", "wait_group 2;", "cp.async of thread [0-9]+ is in flight"),
    "no_commit": ("group_4", r'asm volatile\("cp.async.commit_group;".*', "", "cp.async of thread [0-9]+ is in flight"),
    "no_warp_barrier": ("group_4", r"__syncwarp\(\);", "", "race: .* shared memory"),
    "no_warp_barrier_fma": ("group_1", r"__syncwarp\(\);", "", "race: .* shared memory"),
    "no_block_barrier": ("group_4", r"__syncthreads\(\);", "", "race: .* shared memory"),
    "swizzle": ("group_4", r"(cp_async_cg\w*\(.*\^ \(row_ptr\S* %) 8\)", r"\1 4)", None),
    "transpose_of_values": ("group_4", r"x4\.trans\.shared\.b16 \{", "x4.shared.b16 {", None),
    "transpose_of_weights": ("group_4", r'asm volatile\("movmatrix.*', "__d = __a;", None),
    "order_of_a_pair": ("group_4", r"(cvt.rn.bf16x2.f32 %0, )%1, %2", r"\1%2, %1", None),
    "order_of_a_fragment": ("group_4", r"\{%4, %5, %6, %7\}", "{%4, %6, %5, %7}", None),
    "reads_stale_slots": ("group_4", r"\[%1\], 16, %2;", "[%1], 16;", None),
    "lane_of_a_shuffle": ("group_4", r"(__shfl_xor_sync\(.*), 8, 32\)", r"\1, 4, 32)", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(module_of, name):
    """The emulator stops the kernel and says why, or the result is not the oracle's."""
    spec, pattern, replacement, message = FAULTS[name]
    module = module_of(spec).edited(pattern, replacement)
    inputs = make_inputs(module.spec, LENGTHS)
    with pytest.raises(EmulationError if message else AssertionError, match=message or "out of tolerance"):
        check(module, inputs)


def test_fault_of_an_offset(module_of):
    """Offsets of 32 bits leave the huge cache."""
    module = module_of("group_4").edited(r"^(.*(?:key|value)_ptr\S* = .*)$", narrowed)
    with pytest.raises(EmulationError, match=r"reads 16 bytes at byte -?[0-9]+ of"):
        module.decode(at_the_top(module.spec)[0])


def narrowed(match):
    return match[0].replace("int64_t", "int")
