"""Models of transformers on caches of codes: enable(model, kv_dtype=...)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: models are not run")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: its models are not run")

from pa_compiler.integrations.transformers import disable, enable  # noqa: E402  (needs transformers)
from pa_compiler.integrations.transformers.cache import Codes, PagedCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, hidden_size=128, intermediate_size=128, **shape)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.01), ("int4", 0.15)])
def test_logits_are_those_of_the_type_but_for_its_codes(model, kv_dtype, most):
    """Of 70 tokens at once, and of the same in steps, for which the cache grows."""
    ids = torch.randint(1, 128, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = model(ids).logits
        enable(model, kv_dtype=kv_dtype)
        codes = Codes(kv_dtype)
        whole = model(ids, past_key_values=PagedCache(2, 70, codes), use_cache=True).logits
        cache = PagedCache(2, 8, codes)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([33, 1, 36], dim=1)]
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        disable(model)
    assert tokens.shape == (2, 73)
    assert cache.layers[0].keys.dtype == {"int8": torch.int8, "int4": torch.uint8}[kv_dtype]
    error = (whole - exact).norm() / exact.norm()
    assert 0 < error < most
    assert (torch.cat(parts, dim=1) - whole).norm() / whole.norm() < 1e-4
