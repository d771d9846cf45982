"""decode on CUDA, run on the emulator: groups of every size, with head sizes, block sizes, types and layouts."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import on_device, shared
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec

SPECS = {
    "group_1": PagedAttentionSpec(2, 2, 128, 16, "bfloat16"),
    "group_2": PagedAttentionSpec(4, 2, 64, 1, "float16", kv_layout="HND"),
    "group_3": PagedAttentionSpec(3, 1, 256, 5, "bfloat16", "float32"),
    "group_5": PagedAttentionSpec(5, 1, 80, 8, "float16"),
    "group_6": PagedAttentionSpec(12, 2, 64, 32, "bfloat16", kv_layout="HND"),
    "group_7": PagedAttentionSpec(7, 1, 128, 1, "bfloat16"),
    "group_8": PagedAttentionSpec(8, 1, 128, 5, "float16", "float32"),
    "group_12": PagedAttentionSpec(12, 1, 256, 32, "bfloat16"),
    "group_16": PagedAttentionSpec(16, 1, 128, 16, "float16", "bfloat16", kv_layout="HND"),
    "float32_group_8": PagedAttentionSpec(8, 1, 128, 1, "float32"),
    "64_to_128": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=128),
    "64_to_128_fma": PagedAttentionSpec(2, 2, 64, 16, "float16", kv_layout="HND", value_dim=128),
    "128_to_64": PagedAttentionSpec(12, 1, 128, 5, "float16", kv_layout="HND", value_dim=64),
    "128_to_64_fma": PagedAttentionSpec(3, 1, 128, 1, "bfloat16", "float32", value_dim=64),
    "192_to_128": PagedAttentionSpec(16, 1, 192, 16, "bfloat16", value_dim=128),
    "192_to_128_fma": PagedAttentionSpec(2, 2, 192, 16, "bfloat16", value_dim=128),
    "256_to_16": PagedAttentionSpec(5, 1, 256, 8, "float16", "float32", kv_layout="HND", value_dim=16),
    "256_to_16_fma": PagedAttentionSpec(2, 2, 256, 16, "bfloat16", value_dim=16),
    "16_to_256": PagedAttentionSpec(9, 1, 16, 2, "bfloat16", value_dim=256),
    "80_to_48": PagedAttentionSpec(7, 1, 80, 32, "float16", value_dim=48),
    "48_to_64": PagedAttentionSpec(4, 1, 48, 5, "bfloat16", kv_layout="HND", value_dim=64),
    "float32_192_to_128": PagedAttentionSpec(4, 2, 192, 16, "float32", value_dim=128),
    "float32_256_to_16": PagedAttentionSpec(3, 1, 256, 16, "float32", kv_layout="HND", value_dim=16),
    "float32_16_to_256": PagedAttentionSpec(5, 1, 16, 5, "float32", value_dim=256),
    "shared_192_to_128": PagedAttentionSpec(16, 1, 192, 16, "bfloat16", value_dim=128, shared_kv=True),
    "shared_80_to_64": PagedAttentionSpec(7, 1, 80, 5, "float16", value_dim=64, shared_kv=True),
    "shared_64_fma": PagedAttentionSpec(3, 1, 64, 16, "bfloat16", kv_layout="HND", shared_kv=True),
    "shared_256": PagedAttentionSpec(16, 1, 256, 16, "bfloat16", shared_kv=True),  # warps' results outgrow the rings
    "shared_float32": PagedAttentionSpec(8, 2, 256, 16, "float32", value_dim=192, shared_kv=True),
}
"""head_dim_to_value_dim where they differ."""
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 300, 0, 777)
BLOCK_SIZES, LAYOUTS = (1, 2, 5, 8, 16, 32), ("NHD", "HND")


def bank_conflicts(kernels):
    return kernels.kernels["cuda_decode_kernel"].bank_conflicts


def check(kernels):
    """Empty, short and long sequences, with each poison in all that is not used; the same bits in either order.

    No two rows of the ring that an ldmatrix reads together meet in a bank.
    """
    spec, conflicts = kernels.spec, bank_conflicts(kernels)
    inputs = shared(spec, on_device(make_inputs(spec, LENGTHS)))
    out, lse = kernels.decode(inputs)
    assert_close_to_oracle(spec, inputs, out, lse)
    for array, expected in zip(kernels.decode(inputs, order="reverse"), (out, lse), strict=True):
        assert_same_bits(array, expected)
    for seed, (poison, workers) in enumerate(zip(POISONS, (1, 2, 7, 40, 1, 3), strict=True)):
        lengths = np.random.default_rng(seed).integers(0, 130, 1 + 7 * seed)
        inputs = shared(spec, on_device(make_inputs(spec, lengths, seed=seed, poison=poison)))
        assert_close_to_oracle(spec, inputs, *kernels.decode(inputs, workers=workers))
    assert bank_conflicts(kernels) == conflicts


@pytest.mark.parametrize("name", SPECS)
def test_shape(cuda_decode, name):
    check(cuda_decode(SPECS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", range(1, 17))
def test_every_shape(cuda_decode, group, head_dim, dtype):
    index = 3 * group + head_dim // 128
    layout, block_size = LAYOUTS[index % 2], BLOCK_SIZES[index % len(BLOCK_SIZES)]
    check(cuda_decode(PagedAttentionSpec(group, 1, head_dim, block_size, dtype, kv_layout=layout)))
