"""benchmarks.engines on a small model: each kind of case is measured, checked, kept and printed."""

from __future__ import annotations

import pytest
from families import make_model

torch = pytest.importorskip("torch", reason="torch is not installed: its benchmark is not run")
pytest.importorskip("transformers", reason="transformers is not installed: its benchmark is not run")


from benchmarks import engines, engines_models  # noqa: E402
from benchmarks.engines_report import Case, parsed, print_tables, save  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CASES = {
    "prefill": Case("prefill", "smollm2", "float32", 1, 70, 1),
    "decode": Case("decode", "smollm2", "float32", 1, 300, 2),
    "continuous": Case("continuous", "smollm2", "float32", 1, 600, 2),  # longer than a chunk
}


def test_cases(tmp_path, capsys):
    model, path = make_model("llama"), tmp_path / "results.json"
    model.config._attn_implementation = "sdpa"
    for case in CASES.values():
        assert parsed(str(case)) == case
        rates = engines.measure(model, case)
        assert "pa_compiler" in rates
        assert all(rate > 0 for found in rates.values() for kind in ("wall", "cpu") for rate in found[kind])
        save(path, case, rates)
    print_tables(path)
    out = capsys.readouterr().out
    assert all(f"{what}, tokens/s" in out for what in CASES)
    assert "| smollm2 | float32 | 1 | 300 | 2 |" in out


def test_other_numbers_are_found(monkeypatch):
    """A cache of ours that holds other keys than the others' do."""
    filled = engines_models.filled_cache

    def changed(contender, *others):
        cache = filled(contender, *others)
        if contender == "pa_compiler":
            cache.layers[1].values.neg_()
        return cache

    monkeypatch.setattr(engines, "filled_cache", changed)
    with pytest.raises(AssertionError, match=r"^pa_compiler: expected logits within 0\.001 of DynamicCache's, got "):
        engines.measure(make_model("llama"), CASES["decode"])
