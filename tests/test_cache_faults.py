"""Builds whose file operations fail, and builds that are killed: what they leave is never taken for an entry.

Every build is a real one, in a process of its own: see faulty_builds.py. A directory goes through all faults of a test
without being cleaned up, so that each build meets what the ones before it have left; only entries are removed.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"


class Builds:
    """Builds in one directory, by the program faulty_builds.py."""

    def __init__(self, program, root):
        self._program, self.root = program, root

    def __call__(self, **job):
        """Build as faulty_builds.build() says, and return what became of it."""
        print(json.dumps({"root": str(self.root), **job}), file=self._program.stdin, flush=True)
        return json.loads(self._program.stdout.readline())

    @property
    def entries(self):
        return [path for path in (self.root / "cache").glob("*") if path.is_dir() and not path.name.startswith(".")]

    def expect_right_again(self, rebuild):
        """What is there must serve the next run; with rebuild that run must also be right where nothing is there."""
        if rebuild or self.entries:
            assert self()["outcome"] == "right"
            (entry,) = self.entries
            assert {path.name for path in (self.root / "cache").iterdir()} == {entry.name, f"{entry.name}.lock"}
            shutil.rmtree(entry)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The running program."""
    directory = tmp_path_factory.mktemp("faults")
    faults, library = directory / "faults", directory / "file_faults.so"
    faults.write_bytes(bytes(4096))  # more than struct Faults is
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library]
    subprocess.run([*command, SUPPORT / "file_faults.cc", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAULTS": str(faults)}
    command = [sys.executable, str(SUPPORT / "faulty_builds.py")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def builds(program, tmp_path):
    return Builds(program, tmp_path)


@pytest.fixture(scope="module")
def operations(program, tmp_path_factory):
    """The file operations of a build, by number."""
    return range(1, Builds(program, tmp_path_factory.mktemp("whole"))()["operations"] + 1)


def spread(numbers, wanted):
    """wanted of the numbers, evenly spread, or all of them."""
    return numbers if wanted is None else [numbers[len(numbers) * (2 * i + 1) // (2 * wanted)] for i in range(wanted)]


@pytest.mark.scorecard(21)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_failing_file_operation_gives_the_right_module_or_a_named_error(builds, operations, count, figure, error):
    """Opening, reading, writing, closing, renaming and removing of files and directories, the C++ compiler's too.

    A full disk stays full, the others fail once.
    """
    outcomes = {}
    for i, nth in enumerate(spread(operations, count(1, None))):
        built = builds(nth=nth, error=error, stays=error == errno.ENOSPC)
        outcomes[f"{nth} {built['what']}"] = built["outcome"]
        builds.expect_right_again(rebuild=i % 10 == 0)
    assert not {where: what for where, what in outcomes.items() if what != "right" and not what.startswith("named")}
    figure("failing operations", len(outcomes))
    figure("named errors", sum(what != "right" for what in outcomes.values()))


@pytest.mark.scorecard(20)
def test_a_build_killed_at_a_file_operation_is_done_again(builds, operations, count, figure):
    """By SIGKILL: every other time the C++ compiler dies as well, or goes on alone."""
    killed = 0
    for i, nth in enumerate(spread(operations, count(1, None))):
        built = builds(nth=nth, group=nth % 2 == 0)
        assert built["outcome"] in ("killed", "right"), (nth, built)
        killed += built["outcome"] == "killed"
        builds.expect_right_again(rebuild=i % 4 == 0)
    assert killed
    figure("kills at an operation", killed)


@pytest.mark.scorecard(20)
def test_a_build_killed_at_any_time_is_done_again(builds, count, figure):
    rng = random.Random(0)
    longest, killed = 0.5, 0  # the first is kept to about the seconds that a build takes, however busy the machine
    for i in itertools.count():
        if killed == count(1, 200):
            break
        built = builds(after=rng.uniform(0, longest), group=rng.random() < 0.5)
        assert built["outcome"] in ("killed", "right"), (i, built)
        killed += built["outcome"] == "killed"
        longest *= 1.1 if built["outcome"] == "killed" else 0.7
        builds.expect_right_again(rebuild=i % 4 == 0)
    figure("kills at a random time", killed)
