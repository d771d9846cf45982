"""Score functions on the command line: options, what is printed of them, and the arrays that run and bench make."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner
from drawn_specs import DRAWS_SCORES

from pa_compiler import PagedAttentionSpec, compiler, reference
from pa_compiler.cli import main as cli
from pa_compiler.cli import text
from pa_compiler.cpu import backend
from pa_compiler.verification import cases

SMALL = "--case CaseVarSeq4 --repeat 2".split()
SMALL_CASE = cases.CASES["CaseVarSeq4"]
WORDS = "--window 40 --softcap 2.5 --alibi --sinks --invariant".split()
FIELDS = {"window": 40, "softcap": 2.5, "alibi": True, "sinks": True, "invariant": True}

needs_kernels = pytest.mark.skipif(not DRAWS_SCORES, reason="the targets have no kernels for score functions yet")


@pytest.fixture
def invoke(build_cache):
    """invoke(words...) -> result; an exception that the command lets out is raised."""
    return lambda *words: CliRunner().invoke(cli.main, words, catch_exceptions=False)


@pytest.mark.parametrize("words", [[], WORDS, WORDS[:2], WORDS[2:4], WORDS[4:5], WORDS[5:]], ids=" ".join)
def test_options_are_fields(invoke, monkeypatch, words):
    asked = []
    monkeypatch.setattr(compiler, "emit", lambda spec, *_, **__: asked.append(spec) or {"tensorir": ""})
    assert invoke("inspect", *words).exit_code == 0
    given = {name: value for name, value in FIELDS.items() if f"--{name}" in words}
    assert asked == [dataclasses.replace(cases.DEFAULT.spec, **given)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--window 0", "'--window': expected 1 to 1073741824, got 0"),
        ("--window -5", "'--window': expected 1 to 1073741824, got -5"),
        ("--softcap 0", "'--softcap': expected 1e-30 to 1e+30, got 0.0"),
        ("--softcap nan", "'--softcap': expected 1e-30 to 1e+30, got nan"),
        ("--softcap inf", "'--softcap': expected 1e-30 to 1e+30, got inf"),
    ],
)
@pytest.mark.parametrize("command", ["run", "explain"])
def test_bad_values_are_usage_errors(invoke, command, words, message):
    result = invoke(command, *words.split())
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_what_is_said_of_a_spec():
    plain = PagedAttentionSpec(8, 2, 16, 16, "float32")
    labels = [label for label, _ in text.spec_rows(plain)]
    assert labels == ["spec", "cache", "tiles"]

    def added(**fields):
        rows = text.spec_rows(dataclasses.replace(plain, **fields))
        assert rows[:3] == text.spec_rows(plain)
        return dict(rows[3:])

    assert added(softcap=50) == {"scores": "capped at 50"}
    assert added(alibi=True, sinks=True) == {"scores": "ALiBi, a slope for each head; a sink for each head"}
    assert added(window=1024) == {
        "keys": "the last 1,024 of a sequence; blocks before them are neither looked up nor read"
    }
    assert added(window=1)["keys"].startswith("the last one of a sequence")
    assert list(added(**FIELDS)) == ["bits", "scores", "keys"]


def test_a_window_bounds_the_work_of_a_case():
    case = dataclasses.replace(SMALL_CASE, spec=dataclasses.replace(SMALL_CASE.spec, window=40))
    assert case.seen_tokens == 33 + 40 + 40 + 15
    assert (case.num_tokens, case.num_blocks) == (SMALL_CASE.num_tokens, SMALL_CASE.num_blocks)
    assert case.kv_bytes == case.seen_tokens * case.spec.token_bytes
    assert case.flops == case.seen_tokens * case.spec.token_flops
    assert SMALL_CASE.seen_tokens == SMALL_CASE.num_tokens


def test_arrays_of_a_case():
    assert cases.head_arrays(SMALL_CASE) == {}
    case = dataclasses.replace(SMALL_CASE, spec=dataclasses.replace(SMALL_CASE.spec, **FIELDS))
    heads = cases.head_arrays(case)
    np.testing.assert_allclose(heads["alibi_slopes"], 2.0 ** (-np.arange(1, 17) / 2), rtol=1e-7)
    assert {str(array.dtype) for array in heads.values()} == {"float32"}
    assert {array.shape for array in heads.values()} == {(16,)}
    np.testing.assert_array_equal(heads["sinks"], cases.head_arrays(case)["sinks"])
    assert (heads["sinks"] != cases.head_arrays(case, seed=1)["sinks"]).any()


def test_compare_goes_by_the_arrays_of_a_case():
    case = dataclasses.replace(SMALL_CASE, spec=dataclasses.replace(SMALL_CASE.spec, **FIELDS))
    inputs, heads = cases.make_inputs(case), cases.head_arrays(case)
    exact = reference.decode(*inputs, case.scale, window=40, softcap=2.5, **heads)
    assert cases.compare(exact, case, inputs, **heads).of_tolerance == 0
    other = reference.decode(*inputs, case.scale, window=40, softcap=2.5, **heads | {"sinks": heads["sinks"] + 1})
    assert cases.compare(other, case, inputs, **heads).of_tolerance > 1


def test_explain_says_what_a_window_bounds(monkeypatch):
    monkeypatch.setattr(backend, "emit", lambda *_: {"asm": ""})
    result = CliRunner().invoke(cli.main, ["explain", *WORDS], catch_exceptions=False)
    said = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert "scores capped at 2.5; ALiBi, a slope for each head; a sink for each head" in said
    assert "keys the last 40 of a sequence; blocks before them are neither looked up nor read" in said
    assert "bytes a token in the window:" in said


@needs_kernels
@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_run_and_bench_pass(invoke, pipeline):
    for command in ("run", "bench"):
        result = invoke(command, *SMALL, *WORDS, "--pipeline", pipeline)
        assert result.exit_code == 0, result.output
        assert "+ the rounding of scores, of which" in result.stdout
        assert "the last 40 of a sequence" in result.stdout
        assert "PASS" in result.stdout


@needs_kernels
def test_show_and_verify_know_them(compiled, invoke, tmp_path):
    spec = dataclasses.replace(SMALL_CASE.spec, **FIELDS)
    library = tmp_path / "pa.so"
    compiled(spec).save(library)
    for words in (["show", str(library)], ["verify", str(library), "--seconds", "0"]):
        said = invoke(*words).stdout
        assert "capped at 2.5" in said
        assert "the last 40 of a sequence" in said
