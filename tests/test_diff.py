"""pa-compiler diff: counts first, then text, of targets, specs and libraries."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from pa_compiler import PagedAttentionSpec
from pa_compiler.cli import main as cli
from pa_compiler.cpu.assembly import count, loops

SPEC = PagedAttentionSpec(4, 2, 16, 8, "float32")
COMMON = "--num-heads 4 --num-kv-heads 2 --head-dim 16 --block-size 8 --dtype float32 --no-attend".split()


@pytest.fixture
def diff(build_cache):
    """diff(words...) -> (exit status, what it prints)."""

    def run(*words):
        result = CliRunner().invoke(cli.main, ["diff", *words, *COMMON], env={"COLUMNS": "80"})
        return result.exit_code, result.output

    return run


def numbers(text, name):
    """The numbers beside a name in a table."""
    return [
        int(each.replace(",", "")) for each in re.search(rf"^ *{name} +([-+\d, ]+)$", text, re.MULTILINE)[1].split()
    ]


def test_targets(diff, compiled):
    status, text = diff("x86-64-v3", "x86-64-v4", "--stage", "scheduled")
    assert status == 0, text
    assert "target    A: llvm, x86-64-v3\ntarget    B: llvm, x86-64-v4\n" in text
    sides = [compiled(SPEC, target={"kind": "llvm", "mcpu": f"x86-64-{version}"}) for version in ("v3", "v4")]
    assert numbers(text, "asm")[:2] == [len(side.sources["asm"].splitlines()) for side in sides]
    fmas = [sum(count(loop.code).fmas for loop in loops(side.sources["asm"])) for side in sides]
    assert numbers(text, "FMA") == [*fmas, fmas[1] - fmas[0]]
    assert text.index("stage  lines A") < text.index("--- A/scheduled.py\n+++ B/scheduled.py\n@@")
    assert max(map(len, text.partition("--- A/")[0].splitlines())) <= 80


def test_specs(diff):
    status, text = diff("--head-dim 32", "--head-dim 32 --window 9", "--stage", "none")
    assert status == 0, text
    assert "keys      A: nothing\n" in text
    assert "B: the last 9 of a sequence" in text
    assert "@@" not in text


def test_the_same_twice(diff):
    status, text = diff("x86-64-v3", "--target x86-64-v3")
    assert status == 0, text
    assert re.findall(r"^(\w+) +[AB]: ", text, re.MULTILINE) == ["is", "is"]
    assert numbers(text, "asm")[2:] == [0, 0]
    assert "@@" not in text


def test_libraries(diff, compiled, tmp_path):
    module = compiled(SPEC)
    module.save(tmp_path / "kept.so")
    status, text = diff(str(tmp_path / "kept.so"), "llvm", "--stage", "none")
    assert status == 0, text
    assert numbers(text, "asm")[2:] == [0, 0]


def test_a_library_without_texts(diff, compiled, tmp_path, monkeypatch):
    compiled(SPEC).save(tmp_path / "kept.so")
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("PA_CACHE_DIR", str(tmp_path / "cache"))
    status, text = diff(str(tmp_path / "kept.so"), str(tmp_path / "kept.so"))
    assert status == 0, text
    assert "The texts of these libraries are not in the cache: compile their specs to compare them." in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("no.so", "llvm"), "expected a library, a target or options of a spec, got 'no.so'"),
        (("no-such-cpu", "llvm"), "expected an mcpu that LLVM knows, such as x86-64-v3, got 'no-such-cpu'"),
        (("--no-such-option", "llvm"), "No such option"),
        (("--head-dim 0", "llvm"), "got 0"),
    ],
)
def test_what_is_refused(diff, words, says):
    status, text = diff(*words)
    assert status != 0
    assert says in " ".join(text.split())
