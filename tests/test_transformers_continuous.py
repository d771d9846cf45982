"""generate_batch, transformers' continuous batching, on these kernels and on stock attention in float32."""

from __future__ import annotations

import pytest
from families import make_model

torch = pytest.importorskip("torch", reason="torch is not installed: transformers' models are not run")
pytest.importorskip("transformers", reason="transformers is not installed: its models are not run")

from transformers import GenerationConfig  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

from pa_compiler.integrations.transformers import attention, continuous, disable, enable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def generated(model):
    """New tokens of each prompt. Prompts of more tokens than a batch takes are cut into chunks."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 97, (count,), generator=draw).tolist() for count in (5, 1, 40, 77)]
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=48)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    assert len(found) == len(prompts)
    return [each.generated_tokens for each in found.values()]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_generate_batch(family, monkeypatch):
    """Llama decodes on transformers' pages; layers with windows have none."""
    model = make_model(family)
    expected = generated(model)
    tables, attend = [], continuous.attend_continuous

    def counted(find, query, key, value, arguments, *others):
        tables.append(arguments.get("block_table") is not None)
        return attend(find, query, key, value, arguments, *others)

    monkeypatch.setattr(attention.continuous, "attend_continuous", counted)
    enable(model)
    try:
        assert generated(model) == expected
    finally:
        disable(model)
    assert any(tables) == (family == "llama")
    assert not all(tables)
    assert model.config._attn_implementation == "eager"
