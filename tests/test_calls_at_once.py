"""The same bits from calls at once, and from processes that fork between calls and while others call."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import warnings

import pytest
from inputs import make_inputs
from specs import BASE, every_pipeline, every_spec
from test_invariance import LENGTHS, assert_same, decode

import pa_compiler


@every_spec
@pytest.mark.scorecard(16)
def test_calls_at_once(compiled, spec, pipeline, count, figure):
    """From 16 threads, each with inputs of its own: one token here, sequences that are cut into ranges there."""
    module, calls = compiled(spec, pipeline), count(10, 500)
    batches = [make_inputs(spec, LENGTHS[first : first + 4], seed=first) for first in range(16)]
    expected = [decode(module, inputs) for inputs in batches]
    together = threading.Barrier(len(batches))

    def call_again_and_again(inputs, serial):
        together.wait()
        for _ in range(calls):
            assert_same(decode(module, inputs), serial)

    with concurrent.futures.ThreadPoolExecutor(len(batches)) as pool:
        assert list(pool.map(call_again_and_again, batches, expected)) == [None] * len(batches)
    figure("calls", calls * len(batches))


@every_pipeline
@pytest.mark.scorecard(18)
@pytest.mark.parametrize("child_calls_first", [False, True], ids=["same_module", "module_new_to_the_child"])
def test_fork_after_a_parallel_call(compiled, tmp_path, pipeline, child_calls_first, count, figure):
    """A child, and a child of its own, get the same bits within ten seconds, and so does the parent afterwards."""
    module, inputs = compiled(BASE, pipeline), make_inputs(BASE, LENGTHS)
    expected = decode(module, inputs)
    if child_calls_first:  # a copy of the library with run-time state of its own
        module.save(tmp_path / "copy.so")
        module = pa_compiler.load(tmp_path / "copy.so")
        module.num_threads = 2
    forks = count(2, 50)
    for _ in range(forks):
        assert in_a_child(lambda: assert_same(decode(module, inputs), expected), forks=2)
        assert_same(decode(module, inputs), expected)
    figure("children", 2 * forks)


@every_pipeline
@pytest.mark.scorecard(18)
def test_fork_while_other_threads_call(compiled, pipeline, count, figure):
    """Whatever they hold at that moment, the child has it not."""
    module, forks = compiled(BASE, pipeline), count(5, 100)
    batches = [make_inputs(BASE, LENGTHS, seed=seed) for seed in range(4)]
    expected = [decode(module, inputs) for inputs in batches]
    done = threading.Event()

    def call_until_done(inputs):
        while not done.is_set():
            decode(module, inputs)

    with concurrent.futures.ThreadPoolExecutor(len(batches)) as pool:
        calling = [pool.submit(call_until_done, inputs) for inputs in batches]
        children = [
            in_a_child(lambda: assert_same(decode(module, batches[0]), expected[0]), forks=1) for _ in range(forks)
        ]
        done.set()
    assert all(children)
    assert all(call.result() is None for call in calling)
    figure("children", forks)


def in_a_child(check, forks):
    """Whether a check passes within ten seconds in a process that is so many forks away, and in those between."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of what is tested here
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        code = 1
        try:
            check()
            code = 0 if forks == 1 or in_a_child(check, forks - 1) else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0
