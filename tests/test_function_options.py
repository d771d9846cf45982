"""--score-mod, --mask-mod and --input: functions by module and name, and what the commands say of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULE = """
import numpy as np

def relative(score, batch, head, query_pos, key_pos, *, bias):
    return score + bias[head, np.minimum(query_pos - key_pos, 63)]

def recent(batch, head, query_pos, key_pos):
    return query_pos - key_pos < 20

class Holder:
    method = staticmethod(recent)

number = 3
"""
SPEC = ("--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "16", "--block-size", "8", "--dtype", "float32")
FUNCTIONS = (
    "--score-mod",
    "of_scores:relative",
    "--mask-mod",
    "of_scores:Holder.method",
    "--input",
    "bias=float32:4x64",
)


@pytest.fixture
def command(tmp_path):
    (tmp_path / "of_scores.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0\n")

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "pa_compiler", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def test_a_call_with_functions_passes(command):
    done = command("run", *SPEC, *FUNCTIONS, "--seq-len", "33,64", "--repeat", "1")
    assert done.returncode == 0, done.stderr
    assert "scores    score + bias[head, minimum(query_pos - key_pos, 63)]\n" in done.stdout
    assert "mask      query_pos - key_pos < 20\n" in done.stdout
    assert "arrays    bias float32 [4, 64]\n" in done.stdout
    assert "result    PASS" in done.stdout


def test_a_library_is_shown_and_verified(command):
    assert command("build", *SPEC, *FUNCTIONS, "-o", "pa.so").returncode == 0
    shown = command("show", "pa.so")
    assert "scores    score + bias[head, minimum(query_pos - key_pos, 63)]\n" in shown.stdout
    words = ("verify", "pa.so", "--seconds", "0")
    refused = command(*words, "--score-mod", "of_scores:relative")
    assert refused.returncode == 2
    assert "argument --mask-mod: expected the function that the library was compiled of" in refused.stderr
    found = command(*words, "--score-mod", "of_scores:relative", "--mask-mod", "of_scores:recent")
    assert found.returncode == 0, found.stderr
    assert "result    PASS" in found.stdout
    nothing = command(*words, "--score-mod", "of_scores:nothing")
    assert nothing.returncode == 2
    assert "argument --score-mod: expected module:function, got 'of_scores:nothing'" in nothing.stderr


BAD = {
    "no_function": (("--score-mod", "of_scores"), "'--score-mod': expected module:function, got 'of_scores'"),
    "no_module": (("--mask-mod", "nowhere:f"), "'--mask-mod': expected module:function, got 'nowhere:f', whose module"),
    "broken": (("--mask-mod", "broken:f"), "ZeroDivisionError: division by zero"),
    "number": (("--score-mod", "of_scores:number"), "got 'of_scores:number', which is 3"),
    "input": (("--input", "bias"), "'--input': expected name=dtype:extents"),
    "twice": (("--input", "a=int32:1", "--input", "a=int32:2"), "'--input': expected different names, got a, a"),
    "extent": ((*FUNCTIONS[:4], "--input", "bias=float32:4x0"), "'--input': expected extents from 1 on"),
    "unread": (("--mask-mod", "of_scores:recent", "--input", "bias=float32:4"), "got bias, not read by either"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(command, name):
    words, message = BAD[name]
    done = command("inspect", *SPEC, *words)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
