"""Layers of vLLM on these kernels: steps of sequences on vLLM's pages, against NumPy in float64."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed: layers of vLLM are not run")
    pytest.importorskip("vllm", reason="vllm is not installed: its layers are not run")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from pa_compiler.integrations.vllm.backend import PagedImpl

import numpy as np
from vllm_layers import Sequences, make_layer, numpy_of

from pa_compiler.integrations.vllm.layers import choose_kernels, spec_of

FEATURES = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "gemma 2": {"window": 33, "softcap": 5.0},
    "gpt-oss": {"window": 40, "sinks": True},
}
STEPS = [{0: 3, 1: 50}, {0: 1, 1: 61, 2: 200}, {2: 1, 0: 1, 1: 1}, {1: 5, 0: 1}, {0: 130, 2: 1}]
"""Prompts, chunks of them, guesses, and single tokens, side by side; of sequences in any order."""


FLOAT8 = {
    "fp8": {"kv_cache_dtype": "fp8"},
    "scales of tensors": {"kv_cache_dtype": "fp8_e4m3", "scales": (0.007, 0.3)},
    "scales of heads": {"kv_cache_dtype": "fp8", "scales": ([0.02, 0.006], [30.0, 0.004])},
    "e5m2": {"kv_cache_dtype": "fp8_e5m2", "scales": (2e-5, 0.3)},
    "gpt-oss": {"kv_cache_dtype": "fp8", "scales": (0.02, 0.02), "window": 40, "sinks": True},
}
"""With some scales a few elements are beyond the largest number, with others many are subnormal ones."""


def ours(monkeypatch, dtype, block_size, **features):
    """(layer, spec): a layer on these kernels."""
    layer = make_layer(PagedImpl, monkeypatch, dtype, **features)
    layer.impl.kernels = choose_kernels({"layer": layer}, block_size, dtype)["layer"]
    assert layer.impl.kernels is not None
    return layer, layer.impl.kernels.module.spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_steps(monkeypatch, dtype, features):
    """Slots of no token are NaN, entries of the table that are not used name no page."""
    layer, spec = ours(monkeypatch, dtype, 64, **features)
    assert spec.kv_layout == "packed"
    sequences = Sequences(layer, 64)
    for counts in STEPS:
        _, wrong = sequences.step(counts)
        assert not wrong(spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", FLOAT8.values(), ids=FLOAT8)
def test_steps_on_float8(monkeypatch, dtype, features):
    """Against float64 on the codes that NumPy makes; and pages have these codes, and nothing else is written."""
    layer, spec = ours(monkeypatch, dtype, 64, **features)
    assert spec.kv_layout == "packed"
    assert spec.kv_dtype == ("float8_e5m2" if layer.kv_cache_dtype == "fp8_e5m2" else "float8_e4m3fn")
    assert spec.scales_of == ("head" if layer._k_scale.ndim else "tensor")
    sequences = Sequences(layer, 64)
    for counts in STEPS:
        _, wrong = sequences.step(counts)
        assert not wrong(spec)
    keys, values = (numpy_of(half) for half in sequences.pages.view(*sequences.pages.shape[:2], 2, -1).unbind(2))
    kept = sequences.kept.view(np.uint8).transpose(0, 1, 3, 2, 4)  # [2, pages, heads, tokens, elements]
    assert np.array_equal(keys.reshape(*keys.shape[:2], 64, 64), kept[0].swapaxes(2, 3))
    assert np.array_equal(values.reshape(kept[1].shape), kept[1])


def test_scales_that_change_count(monkeypatch):
    """vLLM may load weights again while it runs, into the same memory."""
    layer, spec = ours(monkeypatch, torch.float32, 64, kv_cache_dtype="fp8", scales=(0.02, 0.02))
    layer._v_scale.fill_(0.3)
    _, wrong = Sequences(layer, 64).step({0: 40})
    assert not wrong(spec)


@pytest.mark.parametrize(
    ("shape", "block_size", "layout"),
    [((6, 2, 80), 32, "packed"), ((4, 4, 40), 128, "packed"), ((2, 1, 33), 32, "HND"), ((3, 1, 256), 40, "HND")],
    ids=["head of 80", "head of 40", "odd head", "page of 40"],
)
def test_shapes(monkeypatch, shape, block_size, layout):
    """Heads and pages that vLLM's kernel has not are among them."""
    layer, spec = ours(monkeypatch, torch.bfloat16, block_size, shape=shape)
    assert spec.kv_layout == layout
    sequences = Sequences(layer, block_size)
    for counts in STEPS:
        _, wrong = sequences.step(counts)
        assert not wrong(spec)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_vllms_own_kernel_means_the_same(monkeypatch, features):
    layer = make_layer(CPUAttentionBackendImpl, monkeypatch, torch.float32, **features)
    sequences = Sequences(layer, 64, poison=0.0)
    for counts in STEPS:
        _, wrong = sequences.step(counts, spare=0)  # whose append takes a slot for each token
        assert not wrong(spec_of(layer, 64, torch.float32))


def test_pages_of_float32_are_laid_out_as_vllm_lays_them_out(monkeypatch):
    """So either kernel reads what the other has written. It is a coincidence, which nothing relies on."""
    layer, _ = ours(monkeypatch, torch.float32, 64)
    other = make_layer(CPUAttentionBackendImpl, monkeypatch, torch.float32)
    first, second = Sequences(layer, 64, poison=0.0), Sequences(other, 64, poison=0.0)
    for counts in STEPS:
        for each in (first, second):
            each.step(counts, spare=0)
    assert torch.equal(first.pages, second.pages)


def test_what_a_call_cannot_take_is_refused_before_anything_is_written(monkeypatch):
    """The library checks tensors that are handed to it as they are."""
    layer, _ = ours(monkeypatch, torch.float32, 64)
    pages = torch.full((4, 2, 64, 128), 7.0)
    new = torch.ones(3, 2, 64)
    for slots, given, error, said in [
        (torch.tensor([0, 256, 1]), new, IndexError, "slot_mapping"),
        (torch.tensor([0, 1, 2]), new.half(), TypeError, "key"),
        (torch.tensor([0, 1, 2]), new.view(3, 1, 128), ValueError, "key"),
    ]:
        with pytest.raises(error, match=said):
            layer.impl.do_kv_cache_update(layer, given, given, pages, slots)
    assert (pages == 7).all()


CHUNKS = {
    (torch.float32, "auto"): ([150], [70, 80], [1] * 150, [149, 1]),
    (torch.float32, "fp8"): ([150], [70, 80], [1] * 150, [149, 1]),
    (torch.bfloat16, "auto"): ([150], [70, 80], [2] * 75),
    (torch.bfloat16, "fp8"): ([150], [70, 80], [2] * 75),
}
"""Of bfloat16, a single token has the bits of a chunk only where the CPU has no AMX."""


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), CHUNKS, ids=str)
def test_a_query_token_has_the_same_bits_in_any_step(monkeypatch, dtype, kv_cache_dtype):
    """In chunks of any size and in decode: in the packed layout, and so whatever vLLM's scheduler does."""
    outs = []
    for chunks in CHUNKS[dtype, kv_cache_dtype]:
        layer, _ = ours(monkeypatch, dtype, 64, kv_cache_dtype=kv_cache_dtype)
        sequences = Sequences(layer, 64)
        noise = torch.randn(3, 150, 8, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
        parts, begin = [], 0
        for count in chunks:
            drawn = iter([noise[0, begin:][:count], noise[1, begin:, :2][:count], noise[2, begin:, :2][:count]])
            monkeypatch.setattr(sequences, "_noise", lambda tokens, heads, drawn=drawn: next(drawn))
            parts.append(sequences.step({0: count}, spare=0)[0])
            begin += count
        outs.append(torch.cat(parts))
    assert all(torch.equal(each, outs[0]) for each in outs)
