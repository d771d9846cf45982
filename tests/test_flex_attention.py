"""Functions written for torch's FlexAttention, compiled as they are, against FlexAttention itself in eager mode.

torch calls them in float64, with keys and values of a sequence side by side and the query at its last position. The
bounds are those of the table of tolerances, and the reference, which has them, is compared with FlexAttention too.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import make_inputs

from pa_compiler import PagedAttentionSpec
from pa_compiler.verification.comparison import compare, oracle

torch = pytest.importorskip("torch", reason="torch is not installed: functions are not compared with FlexAttention's")

from flex_masks import MASKS  # noqa: E402  (they import torch)
from flex_scores import SCORES  # noqa: E402
from torch.nn.attention import flex_attention as flex  # noqa: E402

SHAPES = {  # sweeps, which take tokens in an order of their own, and others
    "8/2_float32": PagedAttentionSpec(8, 2, 64, 16, "float32"),
    "8/2_bfloat16": PagedAttentionSpec(8, 2, 64, 16, "bfloat16"),
    "4/4_bfloat16_HND": PagedAttentionSpec(4, 4, 32, 8, "bfloat16", "float32", kv_layout="HND"),
    "6/1_float32_packed": PagedAttentionSpec(6, 1, 32, 32, "float32", kv_layout="packed"),
    "8/2_float16": PagedAttentionSpec(8, 2, 32, 5, "float16"),
}
FUNCTIONS = {name: {"score_mod": make} for name, make in SCORES.items()}
FUNCTIONS |= {name: {"mask_mod": make} for name, make in MASKS.items()}
FUNCTIONS |= {
    f"{score}_and_{mask}": {"score_mod": SCORES[score], "mask_mod": MASKS[mask]}
    for score, mask in (("alibi", "document"), ("t5_buckets", "first_and_last"), ("tanh_soft_cap", "natten_2d"))
}


def cases():
    """Every function in float32 or bfloat16, and one in three in another shape; with `-m slow` in both types."""
    first, second, *others = SHAPES
    for number, name in enumerate(FUNCTIONS):
        every = (first, second) if number % 2 else (second, first)
        yield pytest.param(name, every[0])
        yield pytest.param(name, every[1], marks=pytest.mark.slow)
        if number % 3 == 0:
            yield pytest.param(name, others[number // 3 % len(others)])


CONTEXTS = [1, 17, 130, 700]
SCALE = 0.75  # scores from about -3 to 3 for 64 elements of both signs


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """FlexAttention in eager mode, with numbers of Python in double precision."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def attend(functions, query, keys, values, sequence):
    """FlexAttention of one query [heads, dim] at the last position of a sequence, in float64: out and lse."""
    last = keys.shape[0] - 1
    score_mod, mask_mod = functions.get("score_mod"), functions.get("mask_mod")
    moved_score = score_mod and (lambda score, b, h, q, k: score_mod(score, b + sequence, h, q + last, k))
    moved_mask = mask_mod and (lambda b, h, q, k: mask_mod(b + sequence, h, q + last, k))
    q, k, v = (torch.from_numpy(each.astype(np.float64)) for each in (query[None], keys, values))
    out, aux = flex.flex_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        moved_score,
        moved_mask and flex.create_block_mask(moved_mask, 1, query.shape[0], 1, last + 1, device="cpu"),
        scale=SCALE,
        enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )
    return out[0, :, 0].numpy(), aux.lse[0, :, 0].numpy()


def expected_of(functions, spec, inputs, plain):
    """The same of every sequence, from caches in the layout NHD."""
    results = []
    for sequence, length in enumerate(CONTEXTS):
        blocks = inputs.block_table[sequence, : -(-length // spec.block_size)]
        keys, values = (cache[blocks].reshape(-1, *cache.shape[2:])[:length] for cache in plain)
        results.append(attend(functions, inputs.query[sequence], keys, values, sequence))
    return [np.stack(each) for each in zip(*results, strict=True)]


@pytest.mark.parametrize(("name", "shape"), [*cases()])
def test_as_flex_attention(compiled, name, shape):
    shape = SHAPES[shape]
    functions = {field: make(shape.num_heads) for field, make in FUNCTIONS[name].items()}
    spec = dataclasses.replace(shape, **functions)
    inputs = make_inputs(shape, CONTEXTS)  # with tokens where a mask hides them, for torch
    plain = make_inputs(dataclasses.replace(shape, kv_layout="NHD"), CONTEXTS)
    expected = expected_of(functions, spec, inputs, (plain.key_cache, plain.value_cache))
    results = compiled(spec).decode(*inputs.arguments, SCALE, return_lse=True)
    reference = oracle(spec, *inputs.arguments, SCALE, spec.kv_layout)
    for field, actual, wanted in zip(("out", "lse"), results, expected, strict=True):
        np.testing.assert_allclose(reference[field][0], wanted, rtol=1e-9, atol=1e-12)
        _, wrong = compare(field, actual, wanted, reference[field][1], inputs.context_lens)
        assert not wrong, wrong


def test_many_functions():
    assert len(FUNCTIONS) >= 24
