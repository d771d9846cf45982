"""The pa-compiler command, as a user types it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from specs import BASE

import pa_compiler
from pa_compiler import artifact, compiler
from pa_compiler.cli import main as cli
from pa_compiler.verification import cases
from pa_compiler.verification.comparison import Errors

# The spec of the seed's small cases, so that all tests share one compiled module.
SMALL = "--case CaseVarSeq4 --repeat 2".split()


@pytest.fixture
def invoke(build_cache):
    """invoke(words...) -> result, with stdout and stderr apart; an exception that the command lets out is raised."""

    def run(*words, **env):
        return CliRunner().invoke(cli.main, words, env=env, catch_exceptions=False)

    return run


def test_run_prints_spec_plan_time_rate_and_error(invoke):
    result = invoke("run", *SMALL, "--seq-len", "33,0,17", "--batch", "3", "--threads", "2")
    assert result.exit_code == 0
    for expected in (
        "16 query heads on 1 kv head of 16, bfloat16 in, float32 out",
        "NHD, blocks of 16 tokens",
        "fused, 2 threads",
        "3 sequences of 0 to 33 tokens, 50 tokens in all",
        "1 work item",
        " ms, median of 2",
        "GFLOP/s",
        "GB/s of KV read",
        "0.01 |out| + 0.008 sum(p |v|), of which",
        "PASS",
    ):
        assert expected in result.stdout
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    "words",
    [
        "--case CaseSmall1",
        "--case CaseVarSeq4",
        "--case CaseVarSeq4 --pipeline staged",
        "--case CaseSmall1 --threads 1",
    ],
)
def test_run_passes(invoke, words):
    result = invoke("run", *words.split())
    assert (result.exit_code, "PASS" in result.stdout) == (0, True), result.output
    assert f"{cases.CASES[words.split()[1]].num_tokens} tokens" in result.stdout


def test_an_option_replaces_what_the_case_says(invoke):
    words = "--num-heads 5 --dtype float32 --kv-layout HND --batch 1".split()
    result = invoke("run", *SMALL, *words)
    assert result.exit_code == 0
    assert "5 query heads on 1 kv head of 16, float32 in, float32 out" in result.stdout
    assert "HND, blocks of 16 tokens" in result.stdout
    assert "1 sequence of 33 tokens" in result.stdout


@pytest.mark.parametrize(
    ("lengths", "total"),
    [("33,64", 33 + 64 + 33), ("33,64,17,128,5", 33 + 64 + 17), ("40", 3 * 40)],
    ids=["repeated", "cut", "one"],
)
def test_seq_len_rule(invoke, lengths, total):
    words = ["run", *SMALL, "--batch", "3"]
    assert f"{total} tokens in all" in invoke(*words, "--seq-len", lengths).stdout
    assert f"{total} tokens in all" in invoke(*words, PA_SEQ_LEN=lengths).stdout


def test_a_long_plan_is_summarised(invoke):
    result = invoke("run", *SMALL, "--batch", "200", "--seq-len", "5,2000", "--max-model-len", "2000")
    assert " more; " in result.stdout
    assert len(result.stdout.splitlines()) < 30


def test_an_empty_batch_and_an_empty_sequence(invoke):
    result = invoke("run", *SMALL, "--batch", "0")
    assert (result.exit_code, "0 sequences, 0 tokens" in result.stdout) == (0, True)
    result = invoke("run", *SMALL, "--batch", "1", "--seq-len", "0")
    assert (result.exit_code, "1 sequence of 0 tokens" in result.stdout) == (0, True)
    assert "none" in result.stdout


@pytest.mark.parametrize("errors", [Errors(1.0, 1.01), Errors(np.inf, np.inf)], ids=["wide", "nan"])
def test_a_wrong_result_fails(invoke, monkeypatch, errors):
    monkeypatch.setattr(cases, "compare", lambda *_: errors)
    result = invoke("run", *SMALL)
    assert (result.exit_code, "FAIL" in result.stdout, "PASS" in result.stdout) == (1, True, False)


def test_a_narrow_terminal_cuts_nothing(invoke, monkeypatch):
    monkeypatch.setattr(cli, "_STDOUT", Console(width=44))
    result = invoke("run", *SMALL)
    assert max(map(len, result.stdout.splitlines())) <= 44
    assert "…" not in result.stdout
    assert "KV read" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-heads", "7", "--num-kv-heads", "3"], "'--num-heads': expected a multiple of num_kv_heads = 3, got 7"),
        (["--head-dim", "0"], "'--head-dim': expected 1 to 8192, got 0"),
        (["--head-dim", "x"], "'--head-dim': 'x' is not a valid integer"),
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--head-tile", "3"], "'--head-tile': expected a power of two, got 3"),
        (["--seq-len", "3,x"], "got '3,x'"),
        (["--seq-len", "3,-1"], "got '3,-1'"),
        (["--seq-len", ""], "got ''"),
        (["--seq-len", "99", "--max-model-len", "98"], "expected at most max_model_len = 98, got 99"),
        (["--batch", "-1"], "-1 is not in the range x>=0"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--target", "warp9"], "'--target': expected an mcpu that LLVM knows, such as x86-64-v3, got 'warp9'"),
        (["--target", "{"], "as JSON, got '{'"),
        (["--target", '{"kind": "rocm"}'], "'--target': expected kind 'llvm' or 'cuda', got 'rocm'"),
        (["--target", "cuda"], "'--target': expected a CPU for run, got 'cuda'; build, explain and inspect take a GPU"),
        (["--target", "sm_90"], "'--target': expected a CPU for run"),
        (["--scale", "nan"], "'--scale'"),
        (["--case", "Case9"], "'Case9' is not one of 'Case1'"),
        ("--batch 100000 --seq-len 2000000 --max-model-len 2000000".split(), "GB are needed and this machine has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_a_usage_error(invoke, words, message):
    result = invoke("run", *SMALL, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_missing_system_compiler_is_named(invoke, tmp_path):
    result = invoke("run", *SMALL, CXX="no-such-compiler", PA_CACHE_DIR=str(tmp_path))
    assert result.exit_code == 1
    assert "no-such-compiler" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "value"), [("PA_THREADING", "x"), ("PA_CPUS", "9-1"), ("PA_TUNE", "7"), ("PA_NUM_THREADS", "")]
)
def test_a_bad_environment_variable_is_one_line(invoke, name, value):
    result = invoke("run", *SMALL, **{name: value})
    assert result.exit_code == 1
    _, said = result.stderr.splitlines()  # after "Compiling ..."
    assert said.startswith(f"Error: {name}: expected ")
    assert said.endswith(f", got {value!r}")


def test_another_error_is_a_defect_and_keeps_its_traceback(invoke, monkeypatch):
    def fail(*_, **__):
        raise ValueError("shapes: of two arrays")

    monkeypatch.setattr(compiler, "emit", fail)
    with pytest.raises(ValueError, match="shapes: of two arrays"):
        invoke("inspect")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ["--help", "cache dir", f"run {' '.join(SMALL)}", "show LIBRARY"])
def test_a_full_disk_is_one_line(build_cache, compiled, tmp_path, words, unbuffered):
    compiled(BASE).save(tmp_path / "LIBRARY")
    command = [Path(sys.executable).with_name("pa-compiler"), *words.split()]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path, check=False
        )
    said = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert (done.returncode, said) == (1, ["Error: [Errno 28] No space left on device"])


def test_build_writes_a_library_that_loads(invoke, tmp_path):
    library = tmp_path / "pa.so"
    result = invoke("build", "-o", str(library), "--head-dim", "16", "--block-size", "16")
    assert result.exit_code == 0
    assert f"{library.stat().st_size:,} bytes" in result.stdout
    module = pa_compiler.load(library)
    assert module.spec == pa_compiler.PagedAttentionSpec(16, 1, 16, 16, "bfloat16", "float32")


def test_build_to_a_folder_that_is_not_there(invoke, tmp_path):
    result = invoke("build", "-o", str(tmp_path / "no" / "pa.so"), "--head-dim", "16", "--block-size", "16")
    assert result.exit_code == 1
    assert "No such file or directory" in result.stderr


def test_every_field_of_the_spec_is_an_option():
    for command in ("run", "bench", "build", "inspect", "explain"):
        options = {parameter.name for parameter in cli.main.commands[command].params}
        assert options >= {field.name for field in dataclasses.fields(pa_compiler.PagedAttentionSpec)}, command


@pytest.mark.parametrize("stage", artifact.STAGE_FILES)
def test_inspect_prints_a_stage_as_it_is(invoke, monkeypatch, stage):
    emitted = {}
    monkeypatch.setattr(
        compiler, "emit", lambda *arguments, **_: emitted.update(arguments=arguments) or {stage: "one\ntwo\n"}
    )
    result = invoke("inspect", "--stage", stage, "--target", "x86-64-v3", "--head-dim", "16", "--pipeline", "staged")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\n")
    spec = pa_compiler.PagedAttentionSpec(16, 1, 16, 128, "bfloat16", "float32")
    assert emitted["arguments"] == (spec, {"kind": "llvm", "mcpu": "x86-64-v3"}, "staged")


@pytest.mark.parametrize(
    ("words", "value_dim", "shared_kv"),
    [("", None, False), ("--value-dim 64", 64, False), ("--value-dim 512 --shared-kv", 512, True)],
)
def test_values_have_options(invoke, monkeypatch, words, value_dim, shared_kv):
    asked = []
    monkeypatch.setattr(compiler, "emit", lambda spec, *_, **__: asked.append(spec) or {"tensorir": ""})
    assert invoke("inspect", "--head-dim", "576", *words.split()).exit_code == 0
    spec = pa_compiler.PagedAttentionSpec(
        16, 1, 576, 128, "bfloat16", "float32", value_dim=value_dim, shared_kv=shared_kv
    )
    assert asked == [spec]


def test_values_that_are_no_part_of_keys_are_a_usage_error(invoke):
    result = invoke("run", *SMALL, "--value-dim", "17", "--shared-kv")
    assert result.exit_code == 2
    assert "'--value-dim': expected 1 to head_dim = 16 with shared_kv, got 17" in result.stderr


def test_inspect_compiles(invoke):
    result = invoke("inspect", "--stage", "asm", "--target", "x86-64-v4", "--head-dim", "16")
    assert result.exit_code == 0
    assert "zmm" in result.stdout


def test_cache(invoke, tmp_path):
    env = {"PA_CACHE_DIR": str(tmp_path / "cache")}
    assert invoke("cache", "dir", **env).stdout == f"{tmp_path / 'cache'}\n"
    assert invoke("run", *SMALL, **env).exit_code == 0
    assert list((tmp_path / "cache").rglob("*.so"))
    assert invoke("cache", "clear", **env).exit_code == 0
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_help_and_version_do_not_import_tvm(invoke):
    assert invoke("--version").stdout == "pa-compiler, version 0.1.0\n"
    code = "import sys; from pa_compiler import cli; sys.exit('tvm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_installed_command(build_cache):
    command = [Path(sys.executable).with_name("pa-compiler"), "run", *SMALL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, "PASS" in done.stdout) == (0, True), done.stderr
    assert "Comparing with NumPy" in done.stderr
