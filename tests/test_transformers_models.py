"""SmolLM2 and Gemma 3 on these kernels and on stock attention, in float32: the likeliest tokens are the same."""

from __future__ import annotations

import importlib.util

import gemma3
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: models are not run")
pytest.importorskip("transformers", reason="transformers is not installed: its models are not run")

from test_readme import ROOT  # noqa: E402
from transformers import GenerationConfig  # noqa: E402  (need transformers)
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

from examples import demo  # noqa: E402
from pa_compiler.integrations.transformers import disable, enable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PACKAGES = {"smollm2": (demo.PACKAGE, demo.load), "gemma3": (gemma3.PACKAGE, gemma3.load)}
LENGTHS = [3, 40, 131, 383, 743]
NEW = 96


@pytest.fixture(scope="module", params=PACKAGES)
def loaded(request):
    """(model, prompts): texts of the licence, of so many tokens."""
    package, load = PACKAGES[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {request.param} is not run")
    tokenizer, model = load(torch.float32)
    ids = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    return model, [ids[100 * index :][:length] for index, length in enumerate(LENGTHS)]


@pytest.fixture
def enabled(loaded):
    """enabled(): the model on these kernels from now on, and in the end as it was."""
    model, _ = loaded
    called = []

    def call():
        enable(model)
        called.append(model)

    yield call
    for each in called:
        disable(each)


def test_generate(loaded, enabled):
    """All prompts in one batch, padded on the left."""
    model, prompts = loaded
    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]).long()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)  # which does not stop at a token
    expected = model.generate(ids, attention_mask=mask, generation_config=config)
    assert expected.shape[1] == longest + NEW
    enabled()
    assert torch.equal(model.generate(ids, attention_mask=mask, generation_config=config), expected)


def test_generate_batch(loaded, enabled):
    """Prompts that are cut into chunks among them."""
    model, prompts = loaded

    def generated():
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(page_size=64, num_blocks=64, max_batch_tokens=512)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return [each.generated_tokens for each in found.values()]

    expected = generated()
    assert [len(each) for each in expected] == [NEW] * len(prompts)
    enabled()
    assert generated() == expected


@pytest.mark.skipif(importlib.util.find_spec(demo.PACKAGE) is None, reason=f"{demo.PACKAGE} is not installed")
def test_demo_of_smollm2(monkeypatch, capsys):
    """It answers and says how fast it was."""
    monkeypatch.setattr("sys.argv", ["demo.py", "What is the capital of France?", "--tokens", "12", "--dtype=float32"])
    demo.main()
    out = capsys.readouterr().out
    assert "Paris" in out
    assert "the same tokens" in out
    assert out.count("tokens/s") == 2
