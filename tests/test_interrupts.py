"""Ctrl-C: it comes out as KeyboardInterrupt, nothing half made stays, and what follows works."""

from __future__ import annotations

import contextvars
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from pa_compiler import interrupts

PROGRAM = Path(__file__).parent / "support" / "interrupted_compiles.py"


def interrupted(tmp_path, *words):
    """What became of a compile in a process of its own."""
    directory = tmp_path / "-".join(map(str, words))
    (directory / "tmp").mkdir(parents=True)
    environment = {**os.environ, "PA_CACHE_DIR": str(directory / "cache"), "TMPDIR": str(directory / "tmp")}
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.scorecard(26)
def test_a_compile_is_interrupted_at_any_moment(tmp_path, count, figure):
    """Within TVM's import, within its passes, and while files are written and compilers run."""
    rng, moments = random.Random(0), [("import", 150)]
    if count(0, 1):
        whole = interrupted(tmp_path, "event", 0)
        assert (whole["outcome"], whole["right"]) == ("compiled", True)
        moments += [("event", rng.randrange(1, whole["events"])) for _ in range(60)]
        moments += [("event", rng.randrange(1, whole["events"]), 3) for _ in range(10)]
        moments += [("import", number) for number in (1, 2, 30, 400)]
    moments += [("seconds", round(rng.uniform(0.9, 2.5), 3)) for _ in range(count(1, 30))]
    caught = 0
    for moment in moments:
        found = interrupted(tmp_path, *moment)
        assert found["right"], (moment, found)
        assert found["outcome"] in ("interrupted", "compiled"), (moment, found)
        if found["outcome"] == "interrupted":
            caught += 1
            entries = [name for name in found["left"] if not name.startswith(".")]
            assert len(moment) == 3 or found["left"] == entries, (moment, found)
            assert len(entries) <= 1, (moment, found)  # of an interrupt that came when all was done
        else:
            assert moment[0] == "seconds", (moment, found)
    assert caught
    figure("interrupted compiles", caught)


@pytest.fixture(autouse=True)
def interruptible():
    """In the background of a shell SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def kill(number=signal.SIGINT, times=1):
    """Out of work, give a signal to the process; wait until the work is told to stop, and the others have come."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while not interrupts._here.task.stopping:
        assert time.monotonic() < deadline, "nobody has told it"
        time.sleep(0.001)
    for _ in range(times - 1):
        os.kill(os.getpid(), number)


def test_work_is_done_in_a_thread_of_its_own_with_the_callers_context():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    here = threading.get_ident()
    assert interrupts.shielded(lambda: (variable.get(), threading.get_ident() != here)) == (7, True)
    nested = interrupts.shielded(lambda: interrupts.shielded(threading.get_ident) == threading.get_ident())
    assert nested
    with pytest.raises(ZeroDivisionError):
        interrupts.shielded(lambda: 1 / 0)


def test_work_goes_on_to_its_next_check():
    steps = []

    def work():
        steps.append("begun")
        kill()
        steps.append("a step done")
        interrupts.check()
        steps.append("one more")

    with pytest.raises(KeyboardInterrupt):
        interrupts.shielded(work)
    assert steps == ["begun", "a step done"]
    interrupts.check()
    assert interrupts.shielded(lambda: 7) == 7


def test_a_second_interrupt_does_not_wait():
    release, ended = threading.Event(), threading.Event()

    def work():
        kill(times=2)
        assert release.wait(30)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        interrupts.shielded(work)
    assert not ended.is_set()
    release.set()
    interrupts._end()
    assert ended.is_set()
    assert not interrupts._running


def test_any_exception_of_a_handler_comes_out():
    def handle(*_):
        raise TimeoutError("of an alarm")

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with pytest.raises(TimeoutError, match="of an alarm"):
            interrupts.shielded(lambda: (kill(signal.SIGALRM), interrupts.check()))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_are_not_told_to_stop():
    """They get no signals. Their work is done where it is."""
    found = []

    def other():
        found.append(interrupts.shielded(threading.get_ident) == threading.get_ident())
        interrupts.check()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [True]


def test_a_child_of_fork_does_not_wait_for_its_parents_work():
    release = threading.Event()

    def work():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork in a process with threads
            child = os.fork()
        if child == 0:
            interrupts._end()
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert interrupts.shielded(work) == 7
    release.set()
