"""Multi-head latent attention in the sizes of DeepSeek-V2 and V3, against the float64 reference."""

from __future__ import annotations

import pytest
from drawn_specs import DRAWS_VALUE_DIMS
from inputs import make_inputs
from specs import range_tokens
from tolerances import assert_close_to_oracle

from pa_compiler import PagedAttentionSpec

pytestmark = pytest.mark.skipif(not DRAWS_VALUE_DIMS, reason="no target has kernels for values that are part of keys")

every_size = pytest.mark.parametrize(
    ("num_heads", "dtype"), [(heads, dtype) for heads in (16, 64, 128) for dtype in ("bfloat16", "float32")]
)


def latent(num_heads, dtype, **fields):
    return PagedAttentionSpec(num_heads, 1, 576, 16, dtype, value_dim=512, shared_kv=True, **fields)


def check(module, context_lens):
    inputs = make_inputs(module.spec, context_lens)
    assert inputs.value_cache is None
    out, lse = module.decode(*inputs.arguments, out=inputs.out, lse=inputs.lse)
    assert_close_to_oracle(module.spec, inputs, out, lse)


@every_size
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_lengths(compiled, num_heads, dtype, kv_layout):
    """Around blocks, tiles and the ranges that a sequence is cut into."""
    spec = latent(num_heads, dtype, kv_layout=kv_layout)
    split = range_tokens(spec)
    check(compiled(spec), [1, 0, 15, 16, 17, 127, 128, 129, split, split + 1, 2 * split + 100])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_staged(compiled, dtype):
    check(compiled(latent(16, dtype), "staged"), [1, 0, 17, 300])


@pytest.mark.slow
@every_size
def test_long_contexts(compiled, num_heads, dtype):
    check(compiled(latent(num_heads, dtype)), [1 << 17, 1 << 10])
