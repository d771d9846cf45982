"""show and verify: one parser and one way of printing, however they are called."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from click.testing import CliRunner
from specs import BASE

from pa_compiler.__main__ import main
from pa_compiler.cli import library as library_cli
from pa_compiler.cli import main as cli
from pa_compiler.runtime import versions
from pa_compiler.verification import verify


@pytest.fixture
def library(compiled, tmp_path):
    path = tmp_path / "a library.so"
    compiled(BASE).save(path)
    return str(path)


@pytest.fixture
def direct(capsys):
    """direct(words...) -> (exit status, what it prints, what it prints to stderr)."""

    def run(*words):
        status = 0
        try:
            main(words)
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


WORDS = {
    "show": (["show", "LIBRARY"], 0, "loads     yes"),
    "verify": (["verify", "LIBRARY", "--seed", "3", "--draw", "1"], 0, "result    PASS"),
    "options_first": (["verify", "--seed=3", "--draw=1", "LIBRARY"], 0, "result    PASS"),
    "help": (["verify", "--help"], 0, "Seed of the draws."),
    "no_library": (["show"], 2, "the following arguments are required: library"),
    "no_such_library": (["show", "no.so"], 2, "argument library: expected a file, got 'no.so', which is none"),
    "a_folder": (["verify", "."], 2, "argument library: expected a file, got '.', which is none"),
    "no_such_option": (["show", "LIBRARY", "--draw", "1"], 2, "unrecognized arguments: --draw 1"),
    "no_abbreviations": (["verify", "LIBRARY", "--sec", "1"], 2, "unrecognized arguments: --sec 1"),
    "a_word_for_a_number": (["verify", "LIBRARY", "--seed", "x"], 2, "argument --seed: invalid int value: 'x'"),
    "below_0": (["verify", "LIBRARY", "--seed", "-1"], 2, "argument --seed: expected at least 0, got -1"),
    "nan": (["verify", "LIBRARY", "--seconds", "nan"], 2, "argument --seconds: expected a number from 0 on, got nan"),
}


@pytest.mark.parametrize(("words", "status", "says"), WORDS.values(), ids=WORDS)
def test_the_same_with_the_other_commands_and_without(direct, library, words, status, says):
    words = [library if word == "LIBRARY" else word for word in words]
    printed = direct(*words)
    assert (printed[0], says in printed[1] + printed[2]) == (status, True), printed
    among_others = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert among_others.exit_code == status
    assert untimed(among_others.stdout) == untimed(printed[1])
    assert untimed(among_others.stderr) == untimed(printed[2])


def untimed(text):
    return [line for line in text.splitlines() if not line.startswith("draws")]


def test_the_other_commands_list_them():
    listed = CliRunner().invoke(cli.main, ["--help"]).stdout
    for name, function in library_cli.COMMANDS.items():
        assert f"  {name} " in listed
        assert function.__doc__.partition(".")[0][:40] in listed


def test_a_damaged_library_is_an_error(direct, tmp_path):
    (tmp_path / "pa.so").write_bytes(b"no library")
    for command in ("show", "verify"):
        status, _, errors = direct(command, str(tmp_path / "pa.so"))
        assert status == 1
        assert "Error: " in errors
        assert "expected a library written by Module.save" in errors


def test_a_bad_environment_variable_is_one_line(direct, library, monkeypatch):
    monkeypatch.setenv("PA_THREADING", "x")
    expected = "Error: PA_THREADING: expected one of auto, own, openmp, got 'x'\n"
    assert direct("verify", library) == (1, "", expected)


def test_ctrl_c_while_the_command_is_imported_is_one_line(direct, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(versions, "absent", interrupted)
    assert direct("--help") == (1, "", "Error: interrupted\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_how_far_it_is(monkeypatch, library):
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = iter(range(100))
    monkeypatch.setattr(verify.time, "monotonic", lambda: next(clock))
    library_cli.main(["verify", library, "--seconds", "3"])
    lines = sys.stderr.getvalue().split("\r")
    assert [line.strip() for line in lines[1:5]] == [f"Verifying: {n} of 3 s" for n in range(4)]
    assert lines[-1] == "\x1b[K"


def test_the_package_is_a_program(library):
    command = [sys.executable, "-m", "pa_compiler", "show", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loads     yes\n")
    assert not done.stderr
