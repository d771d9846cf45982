"""pa-compiler explain: its sections, its JSON, and that it fits 80 and 120 columns, for all of generated/."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from pa_compiler import generate
from pa_compiler.backend import Limits
from pa_compiler.cli import main as cli
from pa_compiler.cli import printing
from pa_compiler.cpu import backend
from pa_compiler.cpu import explain as cpu_explain
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import explain as cuda_explain
from pa_compiler.cuda.target import CudaTarget

OPTIONS = "--num-heads 32 --num-kv-heads 8 --block-size 16 --out-dtype bfloat16 --target x86-64-v4".split()


@pytest.fixture
def explained(compiled, monkeypatch):
    """explained(name) -> (the spec of an entry of generated/, what is said of it), its machine code compiled once.

    Of a GPU's kernels the resources are made up, as many digits as they may have.
    """

    def of(name):
        entry = generate.ENTRIES[name]
        if entry.config["kind"] == "cuda":
            resources = cuda_build.Resources(255, 1024, 4096)
            kernels = dict.fromkeys(("cuda_decode", "cuda_merge", "cuda_check_queries"), resources)
            return entry.spec, cuda_explain.explained(entry.spec, CudaTarget("sm_90"), kernels, None, "H100")
        sources = compiled(entry.spec, entry.pipeline, entry.config, **entry.extras._asdict()).sources
        monkeypatch.setattr(backend, "emit", lambda *_: sources)
        limits = Limits(flops=104.3, bandwidth=28.25)
        return entry.spec, cpu_explain.explain(entry.spec, entry.config, entry.pipeline, limits, Path())

    return of


def printed(spec, explanation, width, sections=printing.SECTIONS):
    file = io.StringIO()
    printing.print_explanation(Console(file=file, width=width), spec, explanation, sections)
    return file.getvalue()


@pytest.mark.parametrize("name", generate.ENTRIES)
def test_it_fits_80_and_120_columns(explained, name):
    spec, explanation = explained(name)
    whole = [*explanation.facts, *explanation.legend, ("", explanation.remark)]
    texts = {width: printed(spec, explanation, width) for width in (80, 120)}
    for width, text in texts.items():
        words = " ".join(text.split())
        assert [said for _, said in whole if " ".join(said.split()) not in words] == []  # no word of them is broken
        long = [line for line in text.splitlines() if len(line) > width]
        assert [line for line in long if " " in line.strip()] == []
    assert texts[80].count("\n") > texts[120].count("\n")


@pytest.mark.parametrize("name", generate.ENTRIES)
def test_sections_are_the_whole_and_the_json_is_the_same(explained, name):
    spec, explanation = explained(name)
    text = {section: printed(spec, explanation, 100, [section]) for section in printing.SECTIONS}
    whole = printed(spec, explanation, 100)
    for section, said in text.items():
        assert said.strip()
        assert said.split() == [word for word in said.split() if word in whole.split()], section
    assert sum(len(said.split()) for said in text.values()) == len(whole.split())

    parts = json.loads(printing.explanation_json(spec, explanation))
    assert list(parts) == list(printing.SECTIONS)
    assert parts["decisions"] == dict(explanation.facts)
    assert parts["spec"]["fields"]["num_heads"] == spec.num_heads
    rows = [line.split() for line in text["loops"].splitlines() if re.fullmatch(r"[\s\d]+", line) and line.strip()]
    assert [[str(loop[head]) for head in explanation.heads] for loop in parts["loops"]] == rows
    assert set(parts["legend"]) <= set(explanation.heads) | {"all"}
    for section in printing.SECTIONS:
        assert json.loads(printing.explanation_json(spec, explanation, [section])) == {section: parts[section]}


def test_the_command(compiled, monkeypatch):
    """--section may be given several times, and --json says what they say; both leave the rest out."""
    entry = generate.ENTRIES["gqa_fused"]
    sources = compiled(entry.spec, entry.pipeline, entry.config, **entry.extras._asdict()).sources
    monkeypatch.setattr(backend, "emit", lambda *_: sources)

    def invoke(*words):
        result = CliRunner().invoke(cli.main, ["explain", *OPTIONS, *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    loops = json.loads(invoke("--json", "--section", "loops", "--section", "legend"))
    assert list(loops) == ["loops", "legend"]
    assert {loop["of"] for loop in loops["loops"]} >= {"inner loops of fused_decode"}
    assert all(isinstance(number, int) for loop in loops["loops"] for head, number in loop.items() if head != "of")
    assert "strategy" not in invoke("--section", "loops")
    assert invoke("--section", "decisions").startswith("vectors ")
    refused = CliRunner().invoke(cli.main, ["explain", *OPTIONS, "--section", "loop"])
    assert (refused.exit_code, "'spec', 'decisions', 'loops', 'legend'" in refused.output) == (2, True)
