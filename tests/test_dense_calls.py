"""DenseCalls: what Module's calls give, bit for bit."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not handed over")

import pa_compiler
from pa_compiler.runtime.dense_calls import DenseCalls

SPECS = [
    pa_compiler.PagedAttentionSpec(6, 2, 32, 16, "bfloat16", kv_layout="packed", sinks=True),
    pa_compiler.PagedAttentionSpec(6, 2, 32, 16, "float32", alibi=True),
    pa_compiler.PagedAttentionSpec(6, 2, 32, 16, "bfloat16", kv_dtype="float8_e4m3fn", kv_scale="head"),
]


def bytes_of(cache):
    return cache.view(torch.uint8)


@pytest.mark.parametrize("spec", SPECS, ids=["sinks", "alibi", "float8"])
def test_results_are_those_of_the_module(compiled, spec):
    module = compiled(spec, attend=True)
    scales, dtype = {}, getattr(torch, spec.dtype)
    if spec.has_scales:
        scales = {"key_scale": torch.tensor([0.02, 0.01]), "value_scale": torch.tensor([0.1, 0.2])}
    calls = DenseCalls(module, **scales)
    caches, others = module.empty_cache(8, like="torch"), module.empty_cache(8, like="torch")
    key, value, query = (torch.randn(40, heads, 32).to(dtype) for heads in (2, 2, 6))
    slots, table = torch.arange(40) + 16, torch.tensor([[1, 2, 0], [3, 0, 0]], dtype=torch.int32)
    module.append_kv(key, value, *caches, slots, **scales)
    calls.append_kv(key, value, *others, slots)
    assert all(torch.equal(bytes_of(one), bytes_of(other)) for one, other in zip(caches, others, strict=True))
    of_heads = torch.linspace(0.1, 0.9, 6)
    slopes, sinks = (of_heads if wanted else None for wanted in (spec.alibi, spec.sinks))
    lens, out = torch.tensor([32, 8]), torch.empty(2, 6, 32, dtype=dtype)
    calls.decode(query[:2], *caches, table, lens, 0.3, out, slopes, sinks)
    options = {"alibi_slopes": slopes, "sinks": sinks, **scales}
    assert torch.equal(out, module.decode(query[:2], *caches, table, lens, 0.3, **options))
    starts, out = torch.tensor([0, 5, 9]), torch.empty(9, 6, 32, dtype=dtype)
    for causal in (True, False):
        calls.attend(query[:9], *caches, table, lens, starts, 0.3, out, causal, slopes, sinks)
        assert torch.equal(out, module.attend(query[:9], *caches, table, lens, starts, 0.3, causal=causal, **options))


def test_scales_are_asked_for(compiled):
    spec = SPECS[-1]
    calls, caches = DenseCalls(compiled(spec, attend=True)), compiled(spec, attend=True).empty_cache(2, like="torch")
    new = torch.zeros(1, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"^key_scale: "):
        calls.append_kv(new, new, *caches, torch.tensor([0]))


def test_a_module_without_attend_is_refused(compiled):
    module = compiled(pa_compiler.PagedAttentionSpec(2, 1, 16, 16, "float32"))
    with pytest.raises(ValueError, match=r"^module: expected one with attend, without inputs, got Module"):
        DenseCalls(module)
