"""How many threads run a call, and on which CPUs: settings, the environment, and callers that are bound."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
from specs import BASE

import pa_compiler
from pa_compiler.runtime import threads
from pa_compiler.runtime.dlpack import as_tensor

BOUND_CALLER = """
cpus = os.sched_getaffinity(0)
first = min(cpus)
hold = threading.Event()
threading.Thread(target=hold.wait, daemon=True).start()  # a thread that nobody binds
os.sched_setaffinity(0, {first})
again = pa_compiler.load(sys.argv[2])
assert again.cpus == cpus and again.num_threads == len(cpus), (again.cpus, again.num_threads)
before = set(os.listdir("/proc/self/task"))

def cpus_of_the_pool():
    # of each thread that is there now: one that was listed may have ended since
    found = {}
    for task in set(os.listdir("/proc/self/task")) - before:
        with contextlib.suppress(ProcessLookupError):
            found[task] = os.sched_getaffinity(int(task))
    return found

def decode_until_a_thread_of_the_pool_is_bound_to(wanted):
    for _ in range(10000):  # a thread that comes late finds its work done, and is not bound
        assert_same(again.decode(*inputs.arguments, return_lse=True), expected)
        pool = cpus_of_the_pool()
        if pool and all(cpus == wanted for cpus in pool.values()):
            return
    raise AssertionError(pool)

again.num_threads = 2
decode_until_a_thread_of_the_pool_is_bound_to(cpus)
assert os.sched_getaffinity(0) == {first}
again.cpus = {first}
decode_until_a_thread_of_the_pool_is_bound_to({first})
hold.set()
"""


def test_a_bound_caller_does_not_bind_the_pool(in_a_process):
    """The process's CPUs count, not those of the thread that makes the module and calls it."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: a caller that is bound to it loses none")
    in_a_process("import warnings; warnings.simplefilter('ignore')\n" + BOUND_CALLER)


def test_a_process_on_one_cpu_has_one_thread(in_a_process):
    """Without a warning, until somebody asks for more threads, and then once."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: the process has no other")
    out = in_a_process(
        """
import warnings
for task in os.listdir("/proc/self/task"):
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.sched_setaffinity(int(task), {min(os.sched_getaffinity(0))})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    again = pa_compiler.load(sys.argv[2])
    assert again.num_threads == 1 and len(again.cpus) == 1
    print(len(caught))
    again.num_threads = 2
    again.num_threads = 3
    print(len(caught), caught[0].category.__name__, caught[0].message)
"""
    )
    first, second = out.splitlines()
    assert first == "0"
    assert second.startswith("1 RuntimeWarning num_threads is 2, and the process may use one of ")


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("threading", "tbb", ValueError, "expected one of auto, own, openmp, got 'tbb'"),
        ("threading", None, ValueError, "expected one of auto, own, openmp, got None"),
        ("cpus", (), ValueError, "expected one CPU at least, got none"),
        ("cpus", {-1}, ValueError, "expected at least 0, got -1"),
        ("cpus", {0.0}, TypeError, "expected an int, got 0.0"),
        ("cpus", "0", TypeError, "expected numbers of CPUs, such as {0, 1}, got '0'"),
        ("cpus", 0, TypeError, "expected numbers of CPUs, such as {0, 1}, got 0"),
        ("cpus", {0, 60000}, ValueError, "got 0,60000, of which it refuses 60000"),
        ("cpus", {2**40}, ValueError, "it refuses 1099511627776"),
    ],
)
def test_settings_are_checked(figure, compiled, name, value, error, words):
    module = compiled(BASE)
    before = module.num_threads, module.threading, module.cpus
    with pytest.raises(error, match=f"^{name}: ") as raised:
        setattr(module, name, value)
    assert words in str(raised.value)
    assert (module.num_threads, module.threading, module.cpus) == before
    figure("kinds", 1)


def test_settings_from_the_environment(compiled, tmp_path, monkeypatch):
    compiled(BASE).save(tmp_path / "pa.so")
    first = min(os.sched_getaffinity(0))
    for name, value in (("PA_THREADING", "openmp"), ("PA_CPUS", str(first)), ("PA_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    module = pa_compiler.load(tmp_path / "pa.so")
    assert (module.threading, module.cpus, module.num_threads) == ("openmp", {first}, 1)
    for name, bad in (
        ("PA_THREADING", "Auto"),
        ("PA_CPUS", ""),
        ("PA_CPUS", "3-1"),
        ("PA_CPUS", "a"),
        ("PA_CPUS", "0-99999"),
        ("PA_CPUS", "60000"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, bad)
            with pytest.raises(ValueError, match=rf"^{name}: .*{bad}"):
                pa_compiler.load(tmp_path / "pa.so")


@pytest.mark.parametrize("cpus", [{0}, {0, 1, 2, 3, 8}, {1, 3, 5}, {7, 8, 62, 63, 64}])
def test_lists_of_cpus(cpus):
    text = threads.text(cpus)
    assert set(threads._parsed("cpus", text)) == cpus
    assert text.count("-") + text.count(",") < 2 * len(cpus)


def test_num_threads_follows_cpus_until_it_is_set(compiled, tmp_path):
    compiled(BASE).save(tmp_path / "pa.so")
    module = pa_compiler.load(tmp_path / "pa.so")
    every = os.sched_getaffinity(0)
    assert (module.cpus, module.num_threads) == (every, len(every))
    module.cpus = {min(every)}
    assert module.num_threads == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        module.num_threads = 2
    module.cpus = every
    assert module.num_threads == 2


def test_a_number_that_cpu_set_did_not_give(compiled):
    module = compiled(BASE)
    _, _, number = module._thread_numbers
    assert module._functions["cpu_set"](as_tensor("cpus", np.array([0], np.int32))) >= 1
    module._thread_numbers = (2, 0, number + 1000)
    arrays = [np.zeros((0, *shape), np.float32) for shape in ((6, 24), (5, 2, 24), (5, 2, 24))]
    with pytest.raises(ValueError, match=r"^cpus: expected a number that cpu_set gave"):
        module.decode(*arrays, np.zeros((0, 0), np.int32), np.zeros(0, np.int32))
