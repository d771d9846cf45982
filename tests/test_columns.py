"""What the command prints on terminals of 80 and of 60 columns: words and numbers stand whole, and none is left out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from click.testing import CliRunner
from rich.console import Console
from specs import BASE

from pa_compiler import PagedAttentionSpec
from pa_compiler.cli import main as cli
from pa_compiler.cli import printing, text
from pa_compiler.cpu import backend
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda import explain as cuda_explain
from pa_compiler.cuda import target as cuda_target

EXPLAINED = {
    "multi-head": "--num-heads 32 --num-kv-heads 32",
    "packed-v3": "--num-heads 32 --num-kv-heads 8 --kv-layout packed --target x86-64-v3",
    "staged-v4": "--num-heads 32 --num-kv-heads 8 --pipeline staged --target x86-64-v4",
    "shared-sapphirerapids": "--num-heads 64 --head-dim 256 --target sapphirerapids --flops 123.5 --bandwidth 9.75",
}
DIGEST = 64
"""Letters of a SHA-256, the one word that is longer than some terminals."""


@pytest.fixture
def printed(build_cache, monkeypatch):
    """printed(words, columns) -> what a command prints on a terminal of so many columns. What it compiles is kept."""
    emit, kept = backend.emit, {}

    def emit_once(*arguments):
        key = str(arguments[:-1])  # without the directory
        return kept.get(key) or kept.setdefault(key, emit(*arguments))

    monkeypatch.setattr(backend, "emit", emit_once)

    def on_terminal(words, columns):
        monkeypatch.setattr(cli, "_STDOUT", Console(width=columns))
        result = CliRunner().invoke(cli.main, words, env={"COLUMNS": str(columns)}, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return on_terminal


def assert_whole(print_on, longest=0):
    """print_on(columns) says the same words at any width, and in lines of that width, or of the longest word."""
    words = print_on(1000).split()
    for columns in (80, 60):
        lines = print_on(columns).splitlines()
        assert " ".join(lines).split() == words
        assert max(map(len, lines)) <= max(columns, longest)


@pytest.mark.parametrize("options", EXPLAINED.values(), ids=EXPLAINED)
def test_explain(printed, options):
    words = printed(["explain", *options.split()], 80).split()
    assert_whole(lambda columns: printed(["explain", *options.split()], columns), max(map(len, words)))
    assert max(map(len, words)) <= 80  # the name of a kernel in a bundle
    kernels = {"qk_matmul", "softmax_prepare"} if "staged" in options else {"fused_decode", "merge_partials"}
    assert kernels <= set(words)


def test_explain_of_a_gpu(capsys):
    """With the numbers of a machine that has NVIDIA's tools, larger than any that it gives."""
    spec = PagedAttentionSpec(32, 8, 128, 16, "bfloat16")
    numbers = Counter({"HMMA.16816": 12345, "FFMA.FTZ": 1234, "LDG.E": 1234, "LDGSTS.E": 1234, "STG.E": 1234})
    kernels = ("cuda_decode", "cuda_merge", "cuda_check_decode", "cuda_append_kv")
    for instructions in (dict.fromkeys(kernels, numbers), None):
        resources = dict.fromkeys(kernels, cuda_build.Resources(124, 1024, 1024))
        chip = cuda_target.CudaTarget("sm_90")
        explanation = cuda_explain.explained(spec, chip, resources, instructions, "H100")

        def print_on(columns, explanation=explanation):
            printing.print_explanation(Console(width=columns), spec, explanation)
            return capsys.readouterr().out

        assert_whole(print_on)
        assert {"decode", "merge", "check_decode", "append_kv", "124", "1024"} <= set(print_on(80).split())


def test_run(printed, monkeypatch):
    monkeypatch.setattr(cli.time, "perf_counter", iter(range(10**6)).__next__)
    lengths = ["--batch", "20", "--seq-len", "5,12345,77,4096", "--max-model-len", "12345"]
    assert_whole(lambda columns: printed(["run", "--case", "CaseVarSeq4", "--repeat", "2", *lengths], columns))


def test_bench(printed, monkeypatch):
    monkeypatch.setattr(cli.time, "perf_counter", iter(range(10**6)).__next__)
    assert_whole(lambda columns: printed(["bench", "--case", "CaseVarSeq4", "--repeat", "3"], columns))


def test_show_and_verify(printed, compiled, tmp_path):
    path = tmp_path / "pa.so"
    compiled(BASE).save(path)
    assert_whole(lambda columns: printed(["show", str(path)], columns), 10 + DIGEST)
    words = ["verify", str(path), "--seconds", "0", "--seed", "3"]
    assert_whole(lambda columns: re.sub(r" \d\.\d s,", " 0.0 s,", printed(words, columns)))


def test_a_long_path_of_the_cache_is_one_word(printed, tmp_path, monkeypatch):
    long = tmp_path / "a" / ("long" * 30)
    monkeypatch.setenv("PA_CACHE_DIR", str(long))
    assert printed(["cache", "dir"], 60) == f"{long}\n"


def test_a_table_is_as_wide_as_what_is_in_it():
    rows = [("1", "1,234,567,890"), "a heading that is longer than all of the columns", ("22", "3")]
    assert text.table(("n", "tokens"), rows, gap=2).splitlines() == [
        " n         tokens",
        "-----------------",
        " 1  1,234,567,890",
        "a heading that is longer than all of the columns",
        "22              3",
    ]


def test_values_of_their_own_are_told():
    spec = PagedAttentionSpec(128, 1, 576, 16, "bfloat16", value_dim=512, shared_kv=True)
    rows = dict(text.spec_rows(spec))
    assert rows["spec"] == "128 query heads on 1 kv head of 576, values of 512, bfloat16 in, bfloat16 out"
    assert rows["cache"] == "NHD, blocks of 16 tokens, a token's value being the first elements of its key"
    assert "value" not in str(text.spec_rows(BASE))


@pytest.mark.parametrize("width", [1, 10, 20, 21])
def test_a_word_is_never_broken(width):
    said = text.facts([("label", "one-of-a-kind 1,234,567"), ("a longer label", "two")], width)
    assert said.split() == "label one-of-a-kind 1,234,567 a longer label two".split()
