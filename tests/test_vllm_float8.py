"""SmolLM2 in vLLM's engine on pages of float8: each layer of each step beside float64, and what float8 costs."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: its engine is not run", allow_module_level=True)

import torch
import vllm_models
from safetensors.torch import save_file
from vllm_processes import engine, generate, prompts

pytestmark = pytest.mark.skipif(not vllm_models.is_installed("smollm2"), reason="SmolLM2 is not installed")

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
NEW = 32
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
SKIPPED = [0, 17]


def run(waves, checked, **options):
    options = {"kv_cache_memory_bytes": 1 << 26, **options}
    return {"engine": engine(**options), "waves": waves, "new": NEW, "checked": checked}


def runs_of(given):
    """By name: all prompts at once; and the longest, then one that begins as it does."""
    shared, whole = [[given[4]], [given[4][:600] + given[1]]], {"enable_chunked_prefill": False}
    float8 = {"dtype": E4M3}
    skipped = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": [str(layer) for layer in SKIPPED]}
    return {
        "whole prompts": run([given], float8, kv_cache_dtype="fp8", max_num_batched_tokens=2048, **whole),
        "chunks": run([given], float8, kv_cache_dtype="fp8_e4m3", max_num_batched_tokens=100),
        "prefix caching": run(shared, float8, kv_cache_dtype="fp8"),
        "preemption": run([given], float8, kv_cache_dtype="fp8", num_gpu_blocks_override=14),
        "e5m2": run([given], {"dtype": E5M2}, kv_cache_dtype="fp8_e5m2"),
        "bfloat16": run([given], float8, kv_cache_dtype="fp8", dtype="bfloat16"),
        "layers that are skipped": run([given], float8 | {"skipped": SKIPPED}, **skipped),
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(what these kernels find by run, what they print)."""
    return generate("smollm2", runs_of(prompts("smollm2")), tmp_path_factory.mktemp("checked"), ours=False)


def is_right(found):
    """Whether each layer of each step was compared, and is within the bound of its type."""
    assert found["calls"] == LAYERS * found["steps"]
    assert 0 < found["worst"] <= 1


@pytest.mark.parametrize("name", runs_of([[]] * 5))
def test_each_layer_of_each_step(given, name):
    found, _ = given
    is_right(found[name])
    assert all(len(tokens) == NEW for tokens in found[name]["tokens"])


def test_what_the_runs_are_for_happens(given):
    found, log = given
    assert found["whole prompts"]["steps"] < found["chunks"]["steps"] - 10
    assert found["prefix caching"]["cached"] == [0, 512]
    assert found["preemption"]["preempted"] > 0
    assert "pa_compiler leaves" not in log
    of_skipped = log.split("run: ['layers that are skipped']")[1]
    assert "pa_compiler attends in 28 layers" in of_skipped
    assert "pa_compiler attends in 2 layers on 1 threads: model.layers.0,17.self_attn.attn" in of_skipped


def test_bytes_of_a_token(given):
    """One for each element of keys and values, so that the memory holds as many pages of 128 tokens."""
    assert given[0]["whole prompts"]["pages"] == (1 << 26) // (LAYERS * 2 * KV_HEADS * HEAD_DIM * 128)


def calibrated(folder, strategy):
    """(SmolLM2 as llm-compressor leaves it, with scales beside its weights and nothing else quantised, the scales)."""
    count = KV_HEADS if strategy == "attn_head" else 1
    scales = np.random.default_rng(0).uniform(0.02, 0.08, (LAYERS, 2, count)).astype(np.float32)
    for file in vllm_models.folder("smollm2").iterdir():
        (folder / file.name).symlink_to(file)
    of_caches = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": of_caches,
    }
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    names = [[f"model.layers.{layer}.self_attn.{each}_scale" for each in "kv"] for layer in range(LAYERS)]
    arrays = {name: torch.tensor(scales[layer, at]) for layer, pair in enumerate(names) for at, name in enumerate(pair)}
    save_file(arrays, folder / "scales.safetensors")
    return folder, scales.tolist()


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_scales_of_a_checkpoint(tmp_path, strategy):
    """Where they are of heads, vLLM's kernel takes the largest for all heads, and these take each for its own."""
    (tmp_path / "model").mkdir()
    model, scales = calibrated(tmp_path / "model", strategy)
    asked = {"run": run([prompts("smollm2")], {"dtype": E4M3, "scales": scales})}
    found, log = generate(model, asked, tmp_path, ours=False)
    is_right(found["run"])
    assert f"kv_scale='{'head' if strategy == 'attn_head' else 'tensor'}'" in log


def logprobs(found):
    return np.concatenate(found["prompt_logprobs"])


LIMITS = {"fp8": 0.2, "fp8_e5m2": 0.35}
"""0.139 and 0.253 were found. In bfloat16 it is 0.041 without float8."""


@pytest.fixture(scope="module")
def with_plug_in(tmp_path_factory):
    """(run of kv_cache_dtype, what these kernels find by kv_cache_dtype)."""

    def asked(kv_cache_dtype):
        sampling = {"prompt_logprobs": 0}
        of = engine(kv_cache_dtype=kv_cache_dtype)
        return {"engine": of, "waves": [prompts("smollm2")], "new": 1, "sampling": sampling}

    folder = tmp_path_factory.mktemp("plug_in")
    found, log = generate("smollm2", {name: asked(name) for name in LIMITS}, folder, ours=True)
    assert log.count("pa_compiler attends in 30 layers") == 2
    return asked, found


def test_what_float8_costs(with_plug_in, tmp_path):
    """In the logarithms of probabilities of a text's tokens, beside vLLM's own attention on pages of float32."""
    asked, found = with_plug_in
    theirs, _ = generate("smollm2", {"auto": asked("auto")}, tmp_path, ours=False)
    for name, limit in LIMITS.items():
        assert 0 < np.abs(logprobs(found[name]) - logprobs(theirs["auto"])).mean() < limit


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's own kernel has no float8 without AVX-512")
def test_beside_vllms_own_float8(with_plug_in, tmp_path):
    """It rounds towards zero, which costs 0.22 where rounding to the nearest costs 0.14. So the bound is of both."""
    asked, found = with_plug_in
    theirs, _ = generate("smollm2", {"fp8": asked("fp8")}, tmp_path, ours=False)
    assert np.abs(logprobs(found["fp8"]) - logprobs(theirs["fp8"])).mean() < 0.36
