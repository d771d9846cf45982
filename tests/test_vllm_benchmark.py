"""benchmarks.engines_vllm on short contexts: each kind of case is measured, kept and printed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: its benchmark is not run", allow_module_level=True)

import vllm_models
from test_readme import ROOT
from vllm_processes import settings

from benchmarks import engines_vllm

CASES = ["prefill/float32/1/70/1", "decode/float32/1/130/2"]


@pytest.mark.parametrize("text", [*CASES, "decode/bfloat16/2/4096/8/compiled"])
def test_names_of_cases(text):
    case = engines_vllm.parsed(text)
    assert str(case) == text
    assert case.mode == ("compiled" if text.endswith("compiled") else "eager")


@pytest.mark.skipif(not vllm_models.is_installed("smollm2"), reason="SmolLM2 is not installed")
def test_cases(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.engines_vllm", "--cases", *CASES, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=settings(ours=True), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == CASES
    for row in rows.values():
        assert list(row) == ["vllm", "pa_compiler"]
        for kinds in row.values():
            assert all(0 < attention < wall for attention, wall in zip(kinds["attention"], kinds["wall"], strict=True))
    assert "| decode | float32 | 1 | 130 | 2 | eager |" in done.stdout
