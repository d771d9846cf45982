"""Whole modules for a GPU against the reference: with --gpu on one, otherwise on the fake driver and the emulator."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.verification import on_gpu as cuda_verify
from pa_compiler.verification import verify

pytestmark = pytest.mark.gpu

SPECS = {
    "gqa_bfloat16": PagedAttentionSpec(32, 8, 128, 16, "bfloat16"),
    "mqa_float16": PagedAttentionSpec(16, 1, 64, 32, "float16", "float32", kv_layout="HND"),
    "gqa_float32": PagedAttentionSpec(32, 8, 128, 16, "float32"),
    "mha_bfloat16": PagedAttentionSpec(4, 4, 128, 1, "bfloat16", "float32", kv_layout="HND"),
    "group_17_float16": PagedAttentionSpec(34, 2, 80, 5, "float16"),
}
SPEC = SPECS["mqa_float16"]
STAGED = PagedAttentionSpec(8, 2, 32, 16, "bfloat16")


def of_head(batch, head, query_pos, key_pos):
    return (key_pos < 4) | ((query_pos - key_pos < 60) & ((key_pos + head) % 3 != 0))


def falling(score, batch, head, query_pos, key_pos):
    return score - (head + 1) * 0.01 * (query_pos - key_pos)


ATTEND = {
    "mma": STAGED,
    "mma_scores": dataclasses.replace(STAGED, window=70, softcap=1.5, alibi=True, sinks=True),
    "mma_functions": dataclasses.replace(STAGED, mask_mod=of_head, score_mod=falling),
    "float32": PagedAttentionSpec(6, 2, 32, 8, "float32", kv_layout="HND", mask_mod=of_head, sinks=True),
    "one_head": PagedAttentionSpec(2, 2, 32, 16, "float16", window=33),
}

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture
def lengths(request):
    """Of the sequences of a call: some that are cut into ranges among them."""
    few = [0, 1, 300, 33, 1100]
    return [*few, 8192, 4097, 20000] * 8 if request.config.getoption("--gpu") else few


def decode(memory, module, inputs, **others):
    """(out, lse) of a call."""
    arrays = dict(
        zip(("query", "key_cache", "value_cache", "block_table", "context_lens"), inputs.arguments, strict=True)
    )
    tensors = {name: memory.put(array) for name, array in (arrays | {"out": inputs.out, "lse": inputs.lse}).items()}
    module.decode(**tensors, **others)
    memory.synchronize()
    return memory.get(tensors["out"]), memory.get(tensors["lse"])


def test_on_a_gpu(request):
    if not request.config.getoption("--gpu"):
        pytest.skip("no GPU: the tests of this file run on the fake driver and the emulator (pytest --gpu -m gpu)")


@every_spec
def test_decode(memory, gpu_module, lengths, spec):
    inputs = make_inputs(spec, lengths)
    results = {check: decode(memory, gpu_module(spec), inputs, check=check) for check in ("device", "host", "none")}
    assert_close_to_oracle(spec, inputs, *results["device"])
    for other in ("host", "none"):
        for one, two in zip(results["device"], results[other], strict=True):
            assert_same_bits(one, two)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(memory, gpu_module, lengths, poison):
    inputs = make_inputs(SPEC, lengths, poison=poison)
    assert_close_to_oracle(SPEC, inputs, *decode(memory, gpu_module(SPEC), inputs))


def test_staged(memory, gpu_module):
    inputs = make_inputs(STAGED, [0, 1, 100, 33] * 5)
    for pipeline in ("fused", "staged"):
        assert_close_to_oracle(STAGED, inputs, *decode(memory, gpu_module(STAGED, pipeline), inputs))


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_verify(memory, gpu_module, pipeline):
    """Random calls of decode and append_kv, with views, huge scores and poison."""
    module = gpu_module(STAGED, pipeline)
    for number in range(4):
        result = verify.verify(cuda_verify.OnGpu(module, memory), seed=1, draw=number)
        assert result.failures == ()
        assert max(result.out.of_tolerance, result.lse.of_tolerance) <= 1


@pytest.mark.parametrize("name", ATTEND)
def test_verify_attend(memory, gpu_module, name):
    """Random calls of attend: poison in all that is not to be read, infinities in later query tokens, trees."""
    module = cuda_verify.OnGpu(gpu_module(ATTEND[name], attend=True), memory)
    for number in (1, 3):
        assert verify.verify(module, seed=2, draw=number).failures == ()


def test_verify_without_torch(gpu_module, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"^torch, by which arrays are brought to a GPU, cannot be imported: "):
        gpu_module(STAGED).verify(0)


def test_bad_indices(memory, gpu_module, lengths):
    """Found on the device, and nothing is written."""
    module, inputs = gpu_module(SPEC), make_inputs(SPEC, lengths)
    context_lens = inputs.context_lens.copy()
    context_lens[3] = -1
    out, lse = decode(memory, module, inputs.replace(context_lens=context_lens))
    assert np.isnan(out.astype(np.float32)).all()
    assert np.isnan(lse).all()
    with pytest.raises(ValueError, match=r"^context_lens: .* for sequence 3, got -1 in an earlier call"):
        module.check_status()
    assert_close_to_oracle(SPEC, inputs, *decode(memory, module, inputs))


@pytest.mark.parametrize("check", ["device", "none"])
def test_graph(memory, gpu_module, lengths, check):
    """Captured once, run twice, with other lengths."""
    module, inputs = gpu_module(SPEC), make_inputs(SPEC, lengths)
    decode(memory, module, inputs, check=check)  # makes what is kept
    tensors = [memory.put(array) for array in (*inputs.arguments, inputs.out, inputs.lse)]
    with memory.captured():
        module.decode(*tensors[:5], out=tensors[5], lse=tensors[6], check=check)
    memory.synchronize()
    for given in (inputs, inputs.replace(context_lens=inputs.context_lens // 2)):
        for tensor, array in zip(tensors[4:], (given.context_lens, given.out, given.lse), strict=True):
            memory.set(tensor, array)
        memory.replay()
        memory.synchronize()
        assert_close_to_oracle(SPEC, given, memory.get(tensors[5]), memory.get(tensors[6]))
