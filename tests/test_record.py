"""pytest --record: the file that a run leaves, and what becomes of it in the next."""

from __future__ import annotations

import json
import types

import pytest
import record


def report(when="call", outcome="passed", **options):
    """As much of pytest's report as is looked at."""
    found = {
        "nodeid": "tests/test_a.py::test_b",
        "when": when,
        "duration": 1.26,
        "user_properties": [],
        "longrepr": None,
    }
    outcomes = {each: each == outcome for each in ("passed", "failed", "skipped")}
    return types.SimpleNamespace(**found | outcomes | {"outcome": outcome} | options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


def rows(path):
    return json.loads(path.read_text())["tests"]


def test_a_test_is_a_row(path):
    recorder = record.Recorder(path)
    recorder.pytest_runtest_logreport(report("setup"))
    assert not path.exists()
    recorder.pytest_runtest_logreport(report(user_properties=[("answers", 70), ("text", "no number")]))
    recorder.pytest_runtest_logreport(report("teardown"))
    (row,) = rows(path).values()
    assert (row.pop("outcome"), row.pop("seconds"), row.pop("answers")) == ("passed", 1.3, 70)
    assert list(row) == ["date", "commit"]
    kept = json.loads(path.read_text())
    assert kept["machine"]
    assert kept["versions"]["python"].startswith("3.")


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        (report(outcome="failed"), "failed"),
        (report("setup", "failed"), "error"),
        (report("setup", "skipped", longrepr=("a.py", 3, "Skipped: no GPU")), "skipped"),
    ],
    ids=["failed", "error", "skipped"],
)
def test_outcomes(path, given, outcome):
    record.Recorder(path).pytest_runtest_logreport(given)
    (row,) = rows(path).values()
    assert row["outcome"] == outcome
    assert row.get("reason") == ("Skipped: no GPU" if outcome == "skipped" else None)


def test_other_tests_stay_and_other_versions_do_not(path, monkeypatch):
    for name in ("one", "two"):
        record.Recorder(path).pytest_runtest_logreport(report(nodeid=name))
    assert list(rows(path)) == ["one", "two"]
    monkeypatch.setattr(record, "versions", lambda: {"python": "3.99"})
    record.Recorder(path).pytest_runtest_logreport(report(nodeid="three"))
    assert list(rows(path)) == ["three"]


def test_tests_that_are_gone_leave(path):
    recorder = record.Recorder(path)
    for name in ("a.py::gone", "a.py::there", "b.py::other"):
        recorder.pytest_runtest_logreport(report(nodeid=name))
    there = [types.SimpleNamespace(nodeid="a.py::there")]
    recorder.pytest_collection_modifyitems(types.SimpleNamespace(args=["a.py::there"]), there)
    assert list(rows(path)) == ["a.py::gone", "a.py::there", "b.py::other"]
    recorder.pytest_collection_modifyitems(types.SimpleNamespace(args=["a.py"]), there)
    assert list(rows(path)) == ["a.py::there", "b.py::other"]


def test_the_newer_row_of_two_files_stays(path, tmp_path):
    about = {"machine": "a CPU", "versions": {"python": "3.11"}}
    early, late = (
        {"outcome": outcome, "date": date} for outcome, date in (("failed", "2026-01"), ("passed", "2026-02"))
    )
    record.write(path, about, {"a": early, "b": late})
    record.write(tmp_path / "other.json", about, {"a": late, "b": early, "c": early})
    record.merge(path, [tmp_path / "other.json"])
    assert rows(path) == {"a": late, "b": late, "c": early}
    record.write(tmp_path / "other.json", about | {"machine": "another"}, {})
    with pytest.raises(ValueError, match="one machine"):
        record.merge(path, [tmp_path / "other.json"])
