"""Values that are longer or shorter than keys, and values that are the beginnings of keys, on CUDA's emulator.

Results of more shapes are in test_cuda_shapes.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_kernels import aligned, build_others, build_staged, on_device, shared, strides
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cuda import build as cuda_build

SPECS = {
    "longer": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=128),
    "shorter": PagedAttentionSpec(8, 2, 64, 5, "float16", kv_layout="HND", value_dim=48),
    "longer_fma": PagedAttentionSpec(4, 2, 48, 5, "float32", kv_layout="HND", value_dim=64),
    "shorter_fma": PagedAttentionSpec(2, 2, 128, 16, "bfloat16", value_dim=64),
}
SHARED = {
    "mma": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=48, shared_kv=True),
    "fma": PagedAttentionSpec(4, 2, 64, 5, "float32", kv_layout="HND", value_dim=48, shared_kv=True),
    "all_of_the_key": PagedAttentionSpec(8, 2, 64, 16, "float16", shared_kv=True),
}
STAGED = {
    "longer_in_tiles": PagedAttentionSpec(9, 1, 32, 16, "bfloat16", head_tile=4, batch_chunk=2, value_dim=48),
    "shorter": PagedAttentionSpec(4, 2, 192, 5, "float16", kv_layout="HND", value_dim=128),
    "float32": PagedAttentionSpec(4, 2, 16, 16, "float32", value_dim=256),
    "shared": PagedAttentionSpec(4, 1, 64, 16, "bfloat16", value_dim=48, shared_kv=True),
}
LENGTHS = (0, 1, 17, 300)

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_shared_spec = pytest.mark.parametrize("spec", SHARED.values(), ids=SHARED)


def apart(cache):
    """The same cache with NaN behind each of its rows."""
    wide = aligned(np.full((*cache.shape[:-1], cache.shape[-1] + 16), np.nan, cache.dtype))
    wide[..., : cache.shape[-1]] = cache
    return wide[..., : cache.shape[-1]]


@every_spec
def test_what_lies_behind_a_row_is_not_read(cuda_decode, spec):
    inputs = on_device(make_inputs(spec, LENGTHS))
    expected = cuda_decode(spec).decode(inputs)
    assert_close_to_oracle(spec, inputs, *expected)
    far = inputs.replace(key_cache=apart(inputs.key_cache), value_cache=apart(inputs.value_cache))
    for actual, same in zip(cuda_decode(spec).decode(far), expected, strict=True):
        assert_same_bits(actual, same)


@every_spec
@pytest.mark.parametrize("workers", [1, 8])
def test_what_lies_around_out_is_not_written(cuda_decode, spec, workers):
    """By cuda_decode, for sequences of one range, and by cuda_merge for the others."""
    kernels, inputs = cuda_decode(spec), on_device(make_inputs(spec, LENGTHS))
    expected, _ = kernels.decode(inputs, workers=workers)
    arguments = kernels.arguments(inputs, workers)
    wide = np.full((len(LENGTHS), spec.num_heads + 1, spec.result_dim + 3), 7, expected.dtype)
    out = wide[:, : spec.num_heads, : spec.result_dim]
    arguments |= {"out": out, **strides(out, out_batch=0, out_head=1)}
    kernels.launch("cuda_decode", arguments)
    kernels.launch("cuda_merge", arguments)
    assert_same_bits(out, expected)
    assert (wide[:, spec.num_heads :] == 7).all()
    assert (wide[:, :, spec.result_dim :] == 7).all()


@every_shared_spec
def test_shared_values_have_the_bits_of_a_cache_of_their_own(cuda_decode, spec):
    inputs = shared(spec, on_device(make_inputs(spec, LENGTHS)))
    expected = cuda_decode(dataclasses.replace(spec, shared_kv=False)).decode(inputs)
    assert_close_to_oracle(spec, inputs, *expected)
    for actual, same in zip(cuda_decode(spec).decode(inputs), expected, strict=True):
        assert_same_bits(actual, same)


@every_shared_spec
def test_shared_values_are_no_arguments(cuda_decode, emulated, spec):
    """Of decode and of append_kv: what is not there is not read twice, and not written."""
    of_values = {"value_cache", "v_block", "v_row", "v_head", "value", "value_token", "value_head"}
    for kernels, name in ((cuda_decode(spec), "cuda_decode"), (build_others(emulated, spec), "cuda_append_kv")):
        names = {parameter.name for parameter in cuda_build.parameters(kernels.source, name)}
        assert {"key_cache", "k_block", "k_row", "k_head"} <= names
        assert not names & of_values


@pytest.mark.parametrize("spec", STAGED.values(), ids=STAGED)
def test_staged(emulated, spec):
    """The values of a shared cache are read where they are: the kernels get key_cache for value_cache."""
    kernels = build_staged(emulated, spec)
    for seed, poison in enumerate(POISONS):
        inputs = shared(spec, on_device(make_inputs(spec, (0, 1, 35, 16), seed=seed, poison=poison)))
        assert_close_to_oracle(spec, inputs, *kernels.decode(inputs))
