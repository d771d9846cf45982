"""SmolLM2 and Gemma 3 in vLLM's engine, in float32: the likeliest tokens are those of vLLM's own backend."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: its engine is not run", allow_module_level=True)

import vllm_models
from vllm_processes import NEW, engine, generate, prompts

LAYERS = {"smollm2": 30, "gemma3": 18}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
FEW_PAGES = {"smollm2": 14, "gemma3": 80}
"""As many as all prompts need, but not with their answers."""


def waves_of(given):
    """All prompts at once; and the longest, and then one that begins as it does, and the same with a shorter one.

    Where the first has gone past a window, as in Gemma 3, vLLM finds no part of its beginning in the cache.
    """
    shared = [[given[4]], [given[4][:600] + given[1]], [given[3]], [given[3] + given[1]]]
    return {"all": [given], "shared": shared}


def runs_of(name, given):
    """What is compared with vLLM's own backend: (waves, run) by name."""
    waves = waves_of(given)

    def run(which="all", abort=None, **options):
        return which, {"engine": engine(**options), "waves": waves[which], "new": NEW, "abort": abort or {}}

    return {
        "whole prompts": run(enable_chunked_prefill=False, enable_prefix_caching=False, max_num_batched_tokens=2048),
        "chunks": run(enable_prefix_caching=False, max_num_batched_tokens=100),
        "prefix caching": run("shared", enable_prefix_caching=True),
        "abort": run(abort={3: 20}),
        "preemption": run(num_gpu_blocks_override=FEW_PAGES[name]),
        "one group of layers": run(disable_hybrid_kv_cache_manager=True),
        "n-grams": run(speculative_config=NGRAM),  # vLLM makes no engine after it in the same process
    }


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def stock(request, tmp_path_factory):
    """(name, runs, what vLLM's own backend finds by waves)."""
    name = request.param
    if not vllm_models.is_installed(name):
        pytest.skip(f"{vllm_models.PACKAGES[name]} is not installed: {name} is not run")
    waves = waves_of(prompts(name))
    plain = {which: {"engine": engine(), "waves": each, "new": NEW} for which, each in waves.items()}
    theirs, log = generate(name, plain, tmp_path_factory.mktemp(name), ours=False)
    assert "pa_compiler" not in log
    return name, runs_of(name, waves["all"][0]), theirs


@pytest.fixture(scope="module")
def given(stock, tmp_path_factory):
    """(name, runs, what vLLM's own backend finds by waves, what these kernels find by run, what they print)."""
    name, runs, _ = stock
    asked = {each: run for each, (_, run) in runs.items()}
    return *stock, *generate(name, asked, tmp_path_factory.mktemp(name), ours=True)


@pytest.mark.parametrize("run", runs_of("smollm2", [[]] * 5))
def test_tokens(given, run):
    _, runs, theirs, ours, _ = given
    which, asked = runs[run]
    expected = list(theirs[which]["tokens"])
    assert all(len(each) == NEW for each in expected)
    for number in asked["abort"]:
        expected[number] = None
    assert ours[run]["tokens"] == expected


def test_what_the_runs_are_for_happens(given):
    """Prompts are cut, found in the cache, preempted and guessed."""
    name, _, theirs, ours, _ = given
    assert ours["whole prompts"]["steps"] < ours["chunks"]["steps"] - 10
    assert ours["prefix caching"]["cached"] == [0, 512 if name == "smollm2" else 0, 0, 256]
    assert ours["preemption"]["preempted"] > 0
    assert ours["n-grams"]["steps"] < theirs["all"]["steps"]


def test_every_layer_is_on_these_kernels(given):
    """As the log says, in which modules are compiled before the first step."""
    name, runs, _, _, log = given
    assert "pa_compiler leaves" not in log
    for part in log.split("run: ")[1:]:
        counts = [int(line.split("attends in ")[1].split()[0]) for line in part.splitlines() if "attends in" in line]
        assert sum(counts) == LAYERS[name]
    assert len(log.split("run: ")) == len(runs) + 1


def test_compile_mode(stock, tmp_path):
    """vLLM has torch compile the model, with attention as an operator in it."""
    name, runs, theirs = stock
    run = runs["whole prompts"][1]
    compiled = run | {"engine": run["engine"] | {"enforce_eager": False}}
    found, log = generate(name, {"compiled": compiled}, tmp_path, ours=True)
    assert found["compiled"]["tokens"] == theirs["all"]["tokens"]
    assert "pa_compiler attends in" in log
    assert "Warming up model for the compilation" in log
