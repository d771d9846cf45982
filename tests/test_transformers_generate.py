"""Models of transformers, of random small configurations, on these kernels and on stock attention in float32."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
from families import FAMILIES, make_model

torch = pytest.importorskip("torch", reason="torch is not installed: transformers' models are not run")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: its models are not run")

from pa_compiler import PagedAttentionSpec  # noqa: E402
from pa_compiler.integrations import modules  # noqa: E402
from pa_compiler.integrations.transformers import PagedCache, disable, enable  # noqa: E402  (needs transformers)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PADDING = [0, 7, 33, 59]
MODULE = PagedAttentionSpec(4, 2, 16, 32, "float32")
"""Of Llama, Qwen3, and others with SHAPE."""
CLOSE = 1e-4
"""Of the largest logit: what float32 leaves after three layers of sums in another order."""


@pytest.fixture
def model(family):
    """It is disabled in the end."""
    made = make_model(family)
    yield made
    if made.config._attn_implementation == "pa_compiler_flash":
        disable(made)


llama = pytest.mark.parametrize("family", ["llama"])


def prompts():
    """Of 60 tokens at most, padded on the left."""
    ids = torch.randint(2, 97, (len(PADDING), 60), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(60) >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def generated(model, ids, mask, **options):
    """(tokens, logits of each step)."""
    given = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    found = model.generate(ids, attention_mask=mask, **given)
    return found.sequences, torch.stack(found.logits)


def assert_untouched():
    """Nothing of ours is in transformers."""
    from transformers.generation.continuous_batching import initialization

    for table in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        assert "pa_compiler_flash" not in table._global_mapping
    assert initialization.ensure_decode_fast_path_is_available.__module__ == initialization.__name__


def assert_close(found, expected):
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(model):
    """Windows of 20 are shorter than the prompts."""
    ids, mask = prompts()
    expected, expected_logits = generated(model, ids, mask, max_new_tokens=40)
    enable(model)
    found, logits = generated(model, ids, mask, max_new_tokens=40)
    assert torch.equal(found, expected)
    assert_close(logits, expected_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_300_decoded_tokens(model):
    """Of the tokens that stock attention takes, so that a near tie changes nothing."""
    ids, mask = prompts()
    expected, expected_logits = generated(model, ids, mask, max_new_tokens=300)
    mask = torch.cat([mask, torch.ones(len(ids), 300, dtype=torch.long)], 1)
    enable(model)
    cache, logits, begin = PagedCache(3, capacity=16), [], 0
    with torch.no_grad():
        for end in range(ids.shape[1], expected.shape[1]):
            step = model(expected[:, begin:end], attention_mask=mask[:, :end], cache=cache, logits_to_keep=1)
            logits.append(step.logits[:, -1])
            begin = end
    assert len(logits) == 300
    assert_close(torch.stack(logits), expected_logits)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mpt", "bloom"])
def test_calls_of_the_model(model):
    """Without a cache, with transformers' own, and with ours in chunks; padding's logits mean nothing."""
    ids, mask = prompts()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        enable(model)
        assert_close(model(ids, attention_mask=mask, use_cache=False).logits[mask > 0], expected[mask > 0])
        for cache in (transformers.DynamicCache(config=model.config), PagedCache(3, capacity=16)):
            parts = []
            for begin, end in ((0, 10), (10, 45), (45, 46), (46, 60)):
                given = {"attention_mask": mask[:, :end], "cache": cache}
                parts.append(model(ids[:, begin:end], **given).logits)
            assert_close(torch.cat(parts, 1)[mask > 0], expected[mask > 0])


@llama
def test_beams_and_more_than_one_turn(model):
    ids, mask = prompts()
    expected, _ = generated(model, ids, mask, max_new_tokens=20, num_beams=3)
    enable(model)
    assert torch.equal(generated(model, ids, mask, max_new_tokens=20, num_beams=3)[0], expected)
    cache = PagedCache(3, capacity=16)
    given = {"do_sample": False, "past_key_values": cache}
    first = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=9, **given)
    assert cache.get_seq_length() == first.shape[1] - 1
    second = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=9, **given)
    assert torch.equal(second, generated(model, ids[:1], mask[:1], max_new_tokens=18)[0])


@llama
def test_disabled_it_is_as_it_was(model):
    ids, mask = prompts()
    before, config = dict(vars(model)), copy.deepcopy(model.config)
    expected = generated(model, ids, mask, max_new_tokens=5)
    enable(model)
    with pytest.raises(ValueError, match=r"^model: expected one that is not enabled, got an enabled LlamaForCausalLM"):
        enable(model)
    disable(model)
    assert_untouched()
    assert vars(model) == before
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(*each) for each in zip(generated(model, ids, mask, max_new_tokens=5), expected, strict=True))
    with pytest.raises(ValueError, match=r"^model: expected one that enable"):
        disable(model)


@llama
def test_modules_that_are_handed_over(model, compiled, monkeypatch):
    """They are called, on the threads that their owner has set; others are on as many as torch."""
    module, calls = compiled(MODULE, attend=True), []
    monkeypatch.setattr(module, "num_threads", 2)
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *each, **options: calls.append(each) or decode(*each, **options))
    ids, mask = prompts()
    expected, _ = generated(model, ids, mask, max_new_tokens=3)
    enable(model)
    assert torch.equal(generated(model, ids, mask, max_new_tokens=3)[0], expected)
    assert not calls
    disable(model)
    enable(model, module)
    assert torch.equal(generated(model, ids, mask, max_new_tokens=3)[0], expected)
    assert len(calls) == 2 * 3  # two steps after the prompt's, three layers
    assert module.num_threads == 2


@llama
@pytest.mark.parametrize(
    ("dtype", "made", "welcome"), [(torch.bfloat16, "packed", "NHD"), (torch.float32, "NHD", "packed")], ids=str
)
def test_layouts_of_caches(model, compiled, monkeypatch, dtype, made, welcome):
    """bfloat16 is packed; a module that is handed over is taken in another layout too, with the same tokens."""
    monkeypatch.setattr(modules, "_MODULES", {})
    modules.keep()
    model.to(dtype)
    ids, mask = prompts()
    found = []
    for kept in ([], [compiled(dataclasses.replace(MODULE, dtype=str(dtype)[6:], kv_layout=welcome), attend=True)]):
        modules._MODULES.clear()
        enable(model, *kept)
        cache = PagedCache(model.config.num_hidden_layers)
        found.append(generated(model, ids, mask, max_new_tokens=8, past_key_values=cache)[0])
        assert {layer.module.spec.kv_layout for layer in cache.layers} == {welcome if kept else made}
        disable(model)
    assert torch.equal(*found)


@llama
def test_modules_follow_the_threads_of_torch(model, monkeypatch):
    monkeypatch.setattr(modules, "_MODULES", {})
    modules.keep()
    before = torch.get_num_threads()
    ids, mask = prompts()
    enable(model)
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            generated(model, ids, mask, max_new_tokens=2)
            (module,) = modules._MODULES.values()
            assert module.num_threads == min(number, len(module.cpus))
    finally:
        torch.set_num_threads(before)


@llama
@pytest.mark.parametrize(("bad", "error"), [("x", TypeError), ("without", ValueError)])
def test_modules_that_are_refused(model, compiled, bad, error):
    module = compiled(MODULE) if bad == "without" else bad
    with pytest.raises(error, match=r"^modules_to_use: expected "):
        enable(model, compiled(MODULE, attend=True), module)
    assert model.config._attn_implementation == "eager"


def not_causal(model):
    model.model.layers[1].self_attn.is_causal = False


@pytest.mark.parametrize("family", ["mpt", "bloom"])
def test_forwards_of_attention_modules_are_put_back(model):
    ids, mask = prompts()
    layers = [each for each in model.modules() if type(each).__name__ in ("MptAttention", "BloomAttention")]
    mine = layers[1].forward = functools.partial(layers[1].forward)  # as libraries do that look at calls
    before = [dict(vars(each)) for each in layers]
    expected = generated(model, ids, mask, max_new_tokens=3)
    enable(model)
    assert all(vars(each)["forward"] is not mine for each in layers)
    disable(model)
    assert [dict(vars(each)) for each in layers] == before
    assert all(torch.equal(*each) for each in zip(generated(model, ids, mask, max_new_tokens=3), expected, strict=True))


@pytest.mark.parametrize("family", ["bloom"])
def test_sums_in_slices_are_refused(model):
    attention = model.transformer.h[2].self_attention
    attention.pretraining_tp, attention.slow_but_exact = 2, True
    before = dict(vars(model))
    with pytest.raises(ValueError, match=r"^model: expected slow_but_exact=False, got a BloomAttention with True"):
        enable(model)
    assert vars(model) == before
    assert all("forward" not in vars(each) for each in model.modules())


REFUSED = [  # id, what is done to a model before it is enabled, what the message begins with
    ("not_causal", not_causal, "model: expected attention that is causal, got .* model.layers.1.self_attn"),
    ("config", lambda m: setattr(m.config, "is_causal", False), "model: expected attention that is causal, .* config"),
    ("double", lambda m: m.double(), "model: expected parameters of float32, float16, bfloat16, got .* of float64"),
    ("layers", lambda m: setattr(m.config, "layer_types", ["chunked_attention"] * 3), "model: expected layers of full"),
]  # fmt: skip


@llama
@pytest.mark.parametrize(("change", "begins"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_models_that_are_refused(model, change, begins):
    change(model)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=rf"^{begins}"):
        enable(model)
    assert_untouched()
    assert vars(model) == before
    assert model.config._attn_implementation == "eager"


def test_families_that_are_refused():
    made = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=16)
    )
    with pytest.raises(
        ValueError, match=r"^model: expected one that calls transformers' AttentionInterface, got OpenAI"
    ):
        enable(made)
    with pytest.raises(TypeError, match=r"^model: expected a PreTrainedModel, got Linear"):
        enable(torch.nn.Linear(2, 2))


@llama
def test_calls_that_are_refused(model):
    ids, mask = prompts()
    enable(model)
    gap = mask.clone()
    gap[0, 5] = 0
    square = torch.zeros(len(ids), 1, 60, 60)
    with torch.no_grad():
        for name, given in (("attention_mask", gap), ("attention_mask", square)):
            with pytest.raises(ValueError, match=rf"^{name}: expected "):
                model(ids, **{name: given})
    with pytest.raises(ValueError, match=r"^key: expected a tensor that needs no gradient"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"^cache_implementation: expected None"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, cache_implementation="static")


@llama
def test_an_unknown_version_is_refused(model, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.raises(RuntimeError, match=r"^transformers: expected version 5\.24, of which .* got 5\.99\.0"):
        enable(model)
    assert_untouched()
    assert model.config._attn_implementation == "eager"
