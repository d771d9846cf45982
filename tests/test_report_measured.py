"""Pages of calls that are measured: the bound, the prediction and the time, or why there is no prediction."""

from __future__ import annotations

import html
import re

import pytest
from pages import words

from pa_compiler import PagedAttentionSpec
from pa_compiler.prediction import calls, rates


@pytest.fixture
def small_cache(monkeypatch):
    """A machine whose last-level cache has 1 MB, so that what is measured is small."""
    for room in (calls, rates):
        monkeypatch.setattr(room, "last_level_cache", lambda: 1 << 20)


def figures(said, label, unit):
    """The numbers with a unit in what a page says of a label."""
    found = re.search(rf" {label} ([\d.,]+ us.*?) (bound|predicted|measured|rate) ", said)
    return [float(number.replace(",", "")) for number in re.findall(rf"([\d.,]+) {unit}", found[1])]


def test_a_measured_call_and_what_was_predicted(compiled, tmp_path, small_cache, monkeypatch):
    monkeypatch.setattr(calls, "unknown", lambda module, case: "")
    of = compiled(PagedAttentionSpec(3, 1, 16, 4, "float32"), target={"kind": "llvm", "mcpu": "x86-64-v3"})
    of.report(tmp_path / "report.html", context_lens=[1500, 40], measure=True)
    page = (tmp_path / "report.html").read_text()
    said = words(page)
    bound, whole, took = (figures(said, label, "us") for label in ("bound", "predicted", "measured"))
    overlap = whole[3] if len(whole) == 4 else min(0, whole[1] + whole[2] - whole[0])
    assert whole[0] == pytest.approx(whole[1] + whole[2] - overlap, abs=0.3)
    assert ("which do not overlap" in said) == (len(whole) == 3)
    ratio, of_bound = re.search(r"predicted is ([\d.]+) of measured; the bound is ([\d.]+) of it", said).groups()
    assert float(ratio) == pytest.approx(whole[0] / took[0], rel=0.1, abs=0.01)
    assert float(of_bound) == pytest.approx(bound[0] / took[0], rel=0.1, abs=0.01)
    points = re.findall(r"(the bound|predicted|measured): ([\d.,]+) GFLOP/s</title>", page)
    assert [label for label, _ in points] == ["the bound", "predicted", "measured"]
    flops = 1540 * of.spec.token_flops
    for (_, rate), seconds in zip(points, (bound[0], whole[0], took[0]), strict=True):
        assert float(rate.replace(",", "")) == pytest.approx(flops / seconds / 1e3, rel=0.05)
    assert "--measure" in html.unescape(re.search(r'<pre class="command"[^>]*>(.*?)</pre>', page)[1])


@pytest.mark.parametrize("reason", ["no compiler", "no order"])
def test_what_is_not_predicted_is_said_by_name(compiled, tmp_path, small_cache, monkeypatch, reason):
    of = compiled(PagedAttentionSpec(3, 1, 4, 2, "float32"))
    if reason == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setattr(calls, "unknown", lambda module, case: "")
    else:
        monkeypatch.setattr(calls, "unknown", lambda module, case: "the order is not known")
    of.report(tmp_path / "report.html", context_lens=[9, 4], flops=10, measure=True)
    page = (tmp_path / "report.html").read_text()
    said = words(page)
    assert re.search(r"measured [\d.,]+ us, median of \d+ calls on one thread", said)
    if reason == "no compiler":
        assert "predicted no: the C++ compiler 'no-such-compiler' is not on PATH" in said
        assert "Roofline of one core" not in said
    else:
        assert "predicted no: the order is not known" in said
        assert "and not a prediction: the order is not known." in said
        assert "the bound: " in said
