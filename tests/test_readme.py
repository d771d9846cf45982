"""What README.md shows is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import pa_compiler
from pa_compiler.cli import main as cli

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
EXAMPLES = [text for language, text in BLOCKS if language == "console" and text.startswith("$ pa-compiler run")]

# What differs from machine to machine, or with TVM's rounding from CPU to CPU.
VARIES = ("target", "pipeline", "time", "rate", "error", "bound")


def test_python_example_runs(build_cache, tmp_path, monkeypatch, capsys):
    (code,) = (text for language, text in BLOCKS if language == "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "WorkItem(batch_start=0" in printed
    assert "def fused_decode" in printed


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split("\n")[0][2:])
def test_command_prints_what_is_shown(build_cache, monkeypatch, example):
    monkeypatch.setattr(cli, "_STDOUT", Console(width=80))

    def steady(text):
        return [line.rstrip() for line in text.splitlines() if not line.startswith(VARIES)]

    command, _, shown = example.partition("\n")
    result = CliRunner().invoke(cli.main, shlex.split(command)[2:], catch_exceptions=False)
    assert result.exit_code == 0
    assert steady(result.stdout) == steady(shown)
    assert {line.split()[0] for line in shown.splitlines() if line} >= set(VARIES)


def test_verify_prints_what_is_shown(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    compiled(pa_compiler.PagedAttentionSpec(32, 8, 128, 16, "bfloat16")).save("pa.so")
    (shown,) = (text for _, text in BLOCKS if text.startswith("$ pa-compiler verify pa.so\n"))
    result = CliRunner().invoke(cli.main, ["verify", "pa.so", "--seconds", "0"], catch_exceptions=False)

    def steady(text):
        return [line.rstrip() for line in text.splitlines() if not line.startswith(("target", "draws", *VARIES))]

    assert steady(result.stdout) == steady(shown)[1:]


def test_every_command_named_exists(build_cache):
    for words in re.findall(r"`(pa-compiler [^`]+)`", TEXT):
        arguments = shlex.split(words)[1:]
        result = CliRunner().invoke(cli.main, [*arguments, "--help"], catch_exceptions=False)
        assert result.exit_code == 0, result.output


def test_every_test_named_exists():
    named = re.findall(r"`tests/(\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 5
    for file, name in named:
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https://)([^)#]+)", TEXT):
        assert (Path(__file__).parent.parent / target).exists(), target
