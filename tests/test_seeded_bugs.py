"""Every seeded bug is caught: the package is copied with one fault in it, and the tests named for it have to fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from seeded_bugs import FAULTS, Fault

ROOT = Path(__file__).parents[1]

_SAMPLE = sorted(FAULTS, key=lambda name: name != "work items across chunks")
"""The first, which `make test` seeds, is one whose tests take seconds."""


def package(directory: Path) -> dict[str, Path]:
    """A copy of the package and its tests, installed by its place: where each top-level folder went."""
    inside = directory / "pa_compiler"
    places = {"pa_compiler": inside, "schedules": inside / "schedules", "templates": inside / "templates"}
    places["tests"] = directory / "tests"
    for name, place in places.items():
        shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, directory)
    return places


def run_tests(directory: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest up to the first failure, with the copy in directory instead of what is installed."""
    files = [f"tests/{name}" for name in arguments.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PA_", "COV"))}
    environment |= {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_edit(name):
    """What is to be replaced is there once; otherwise the list has to follow the code."""
    fault: Fault = FAULTS[name]
    assert (ROOT / fault.file).read_text().count(fault.right) == 1
    assert fault.right != fault.wrong


@pytest.mark.scorecard(25)
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_is_caught(number, tmp_path, count, figure):
    if number >= count(1, len(FAULTS)):
        pytest.skip("make soak seeds all of them")
    fault = FAULTS[_SAMPLE[number]]
    places = package(tmp_path)
    folder, *rest = Path(fault.file).parts
    file = places[folder].joinpath(*rest)
    file.write_text(file.read_text().replace(fault.right, fault.wrong))
    run = run_tests(tmp_path, fault.tests)
    failed = run.returncode == 1 and re.search(r"^(FAILED|ERROR) ", run.stdout, re.MULTILINE)
    crashed = run.returncode < 0  # a fault that reads where nothing is may end the process
    assert failed or crashed, f"{_SAMPLE[number]}: survived\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    figure("faults caught", 1)
