"""append_kv and decode of CUDA modules whose values are longer or shorter than keys, or in them, on the fake driver."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import shared
from inputs import make_inputs, poison_value
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec

SPECS = {
    "longer": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=128),
    "shorter": PagedAttentionSpec(4, 2, 192, 5, "float32", "float16", kv_layout="HND", value_dim=128),
    "shared": PagedAttentionSpec(16, 1, 192, 16, "bfloat16", value_dim=128, shared_kv=True),
    "shared_fma": PagedAttentionSpec(4, 2, 64, 16, "float32", kv_layout="HND", value_dim=48, shared_kv=True),
}
LENGTHS = (0, 1, 33, 700)

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def tokens(spec, inputs):
    """(slots, key, value) of all tokens in the caches, in an order of their own; value is None where keys have it."""
    block, slot = np.nonzero(np.isfinite(rows(spec, inputs.key_cache)).all(axis=(2, 3)))
    order = np.random.default_rng(0).permutation(len(block))
    block, slot = block[order], slot[order]
    key = rows(spec, inputs.key_cache)[block, slot]
    value = None if spec.shared_kv else rows(spec, inputs.value_cache)[block, slot]
    return block * spec.block_size + slot, key, value


def rows(spec, cache):
    """A view of [blocks, slots, heads, dim]."""
    return cache if spec.kv_layout == "NHD" else cache.swapaxes(1, 2)


def on_gpu(gpu, array, **options):
    return None if array is None else gpu.tensor(array, **options)


@pytest.mark.parametrize(
    ("pipeline", "check"), [("fused", "host"), ("fused", "device"), ("fused", "none"), ("staged", "host")]
)
@every_spec
def test_decode_of_what_was_appended(gpu, gpu_module, spec, pipeline, check):
    module, inputs = gpu_module(spec, pipeline), shared(spec, make_inputs(spec, LENGTHS))
    slots, key, value = tokens(spec, inputs)
    poison = poison_value("nan", inputs.key_cache.dtype)
    caches = {
        "key_cache": gpu.tensor(np.full_like(inputs.key_cache, poison)),
        "value_cache": None if spec.shared_kv else gpu.tensor(np.full_like(inputs.value_cache, poison)),
    }
    new = {"key": key, "value": value, "slot_mapping": slots}
    module.append_kv(**{name: on_gpu(gpu, array, writable=False) for name, array in new.items()}, **caches, check=check)
    gpu.run()
    assert_same_bits(caches["key_cache"].array, inputs.key_cache)
    if not spec.shared_kv:
        assert_same_bits(caches["value_cache"].array, inputs.value_cache)

    given = {name: getattr(inputs, name) for name in ("query", "block_table", "context_lens")}
    out = gpu.tensor(np.full((len(LENGTHS), spec.num_heads, spec.result_dim), np.nan, inputs.out_dtype))
    lse = gpu.tensor(inputs.lse)
    arrays = {name: on_gpu(gpu, array, writable=False) for name, array in given.items()}
    module.decode(**arrays, **caches, out=out, lse=lse, check=check)
    gpu.run()
    assert_close_to_oracle(spec, inputs, out.array, lse.array)
