"""append_kv and then decode: what one has written the other attends to, as attention without blocks does."""

from __future__ import annotations

import numpy as np
from inputs import DTYPES, Inputs
from test_append import every_spec
from tolerances import assert_close_to_oracle

from pa_compiler import reference


def contiguous_attention(query, key, value):
    """One query token [num_heads, head_dim] on all of key and value [tokens, num_kv_heads, head_dim]."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    group = len(query) // key.shape[1]
    key, value = key.repeat(group, axis=1), value.repeat(group, axis=1)
    weights = np.exp(np.einsum("hd,thd->ht", query, key) / np.sqrt(query.shape[1]))
    return np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), value)


@every_spec
def test_append_then_attend(compiled, spec):
    """A prompt for each sequence at once, then token after token, into caches full of NaN."""
    module, rng, dtype = compiled(spec), np.random.default_rng(0), DTYPES[spec.dtype]
    prompts, steps = np.array([1, 2 * spec.block_size, 17]), 3
    lengths = prompts + steps
    max_blocks = -(-int(lengths.max()) // spec.block_size)
    block_table = rng.permutation(3 * max_blocks).reshape(3, max_blocks).astype(np.int32)
    query = rng.uniform(-1, 1, (3, spec.num_heads, spec.head_dim)).astype(dtype)
    tokens = rng.uniform(-1, 1, (2, 3, int(lengths.max()), spec.num_kv_heads, spec.head_dim)).astype(dtype)
    caches = module.empty_cache(3 * max_blocks)
    for cache in caches:
        cache.fill(np.nan)

    def append(pairs):
        sequence, position = np.array(pairs).T
        slots = block_table[sequence, position // spec.block_size].astype(np.int64) * spec.block_size
        module.append_kv(*tokens[:, sequence, position], *caches, slots + position % spec.block_size)

    append([(sequence, t) for sequence in range(3) for t in range(prompts[sequence])])
    for step in range(steps):
        append([(sequence, prompts[sequence] + step) for sequence in range(3)])

    context_lens = lengths.astype(np.int32)
    out = reference.decode(query, *caches, block_table, context_lens, kv_layout=spec.kv_layout)
    for sequence, length in enumerate(lengths):
        expected = contiguous_attention(query[sequence], *tokens[:, sequence, :length])
        np.testing.assert_allclose(out[sequence], expected, rtol=1e-12, atol=1e-13)
    inputs = Inputs(query, *caches, block_table, context_lens, DTYPES[spec.result_dtype], spec.result_dim)
    assert_close_to_oracle(spec, inputs, module.decode(*inputs.arguments))
