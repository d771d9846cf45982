"""Whose threads run a call, and on which CPUs: OpenMP's team, a pool of the library's own, callers that are bound.

What loads an OpenMP runtime, binds threads or forks runs in a process of its own. tests/openmp.cc is a runtime whose
answers a test sets.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from specs import BASE, every_spec

import pa_compiler
from pa_compiler.runtime import threads
from pa_compiler.runtime.dlpack import as_tensor

PREAMBLE = """
import ctypes, os, signal, sys, threading
sys.modules["torch"] = None  # where it is installed, tvm-ffi imports it, and an OpenMP runtime with it
sys.path.insert(0, sys.argv[1])
import numpy as np
import pa_compiler
from inputs import make_inputs
from tolerances import assert_same_bits

module = pa_compiler.load(sys.argv[2])
runtime_path = sys.argv[3]
inputs = make_inputs(module.spec, [5000, 0, 1, 17, 2048, 33, 3000, 4000])

def decode(module=module, **settings):
    for name, value in settings.items():
        setattr(module, name, value)
    return module.decode(*inputs.arguments, return_lse=True)

def assert_same(found, expected):
    for array, other in zip(found, expected):
        assert_same_bits(array, other)

assert module.openmp is None, module.openmp
expected = decode(num_threads=1)

def in_a_child(check):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0

def region(runtime, body, num_threads=2):
    # run a function on each thread of a team of a real runtime
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: body())
    runtime.GOMP_parallel(function, None, num_threads, 0)
"""


@pytest.fixture(scope="session")
def fake_runtimes(tmp_path_factory):
    """Libraries with the name of an OpenMP runtime: one that has all functions, and one that lacks one of them."""
    directory = tmp_path_factory.mktemp("openmp")
    built = {}
    for name, flags in (("complete", ()), ("incomplete", ("-DINCOMPLETE",))):
        built[name] = directory / name / "libomp.so.5"
        built[name].parent.mkdir()
        source = Path(__file__).with_name("openmp.cc")
        subprocess.run(["g++", "-shared", "-fPIC", "-pthread", *flags, source, "-o", built[name]], check=True)
    return built


@pytest.fixture
def run(compiled, tmp_path, fake_runtimes):
    """Run a program after PREAMBLE in a new process, which has a library and the path of a runtime."""

    def run_program(text, spec=BASE, pipeline="fused", runtime="complete", **environment):
        library = tmp_path / "pa.so"
        compiled(spec, pipeline).save(library)
        path = str(fake_runtimes.get(runtime, runtime))
        program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + text]
        cleared = {name: value for name, value in os.environ.items() if not name.startswith(("PA_", "OMP_"))}
        arguments = [str(Path(__file__).parent), str(library), path]
        done = subprocess.run(
            [*program, *arguments], env=cleared | environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_program


@pytest.fixture
def libgomp():
    """GCC's runtime, which comes with g++."""
    name = ctypes.util.find_library("gomp")
    if name is None:
        pytest.skip("libgomp is not installed: calls on its team are not tested")
    return name


@every_spec
def test_the_same_bits_on_a_team(run, libgomp, spec, pipeline):
    """And it is the team that computes: the process gets its threads and no others."""
    program = """
runtime = ctypes.CDLL(runtime_path)
assert os.path.basename(module.openmp).startswith("libgomp"), module.openmp
runtime.omp_set_num_threads(3)
for limit in (2, 3, 8):
    assert_same(decode(num_threads=limit), expected)
    assert_same(decode(threading="openmp"), expected)
    module.threading = "auto"
if module.pipeline == "fused":  # the staged one has one work item
    assert len(os.listdir("/proc/self/task")) == THREADS_BEFORE + 2
assert_same(decode(threading="own"), expected)
"""
    before = 'THREADS_BEFORE = len(os.listdir("/proc/self/task"))\n'
    run(before + program, spec, pipeline, libgomp)


def test_what_a_team_is_asked_for(run):
    """All of its threads, in one region for each parallel call; none for a call that one thread does as soon."""
    run("""
runtime = ctypes.CDLL(runtime_path)
regions, threads = (ctypes.c_int.in_dll(runtime, name) for name in ("regions", "threads"))
assert module.openmp == runtime_path
for count in (2, 5):
    threads.value = count
    for limit in (2, 3):
        before = regions.value
        assert_same(decode(num_threads=limit), expected)
        assert regions.value == before + 1
before = regions.value
decode(num_threads=1)
small = make_inputs(module.spec, [3, 4])
module.num_threads = 2
module.decode(*small.arguments)
assert regions.value == before
""")


def test_where_a_call_takes_threads_of_its_own(run):
    """A team of one, a parallel region around the call, CPUs that were set, and "own"."""
    run("""
runtime = ctypes.CDLL(runtime_path)
regions, threads, nested = (ctypes.c_int.in_dll(runtime, name) for name in ("regions", "threads", "is_in_parallel"))
module.num_threads = 2
threads.value = 1
assert module.openmp is None
assert_same(decode(), expected)
threads.value, nested.value = 2, 1
assert module.openmp is None
assert_same(decode(), expected)
assert_same(decode(threading="openmp"), expected)
nested.value = 0
assert_same(decode(threading="own"), expected)
assert_same(decode(threading="auto", cpus=module.cpus), expected)
assert regions.value == 0
threads.value = 1
assert_same(decode(threading="openmp"), expected)
assert regions.value == 1
""")


def test_a_runtime_that_lacks_a_function_is_none(run):
    run(
        """
ctypes.CDLL(runtime_path)
assert module.openmp is None
assert_same(decode(num_threads=2), expected)
""",
        runtime="incomplete",
    )


def test_openmp_where_there_is_no_runtime(run):
    """Nothing is written, whatever the size of the call."""
    run("""
out = np.full_like(expected[0], 7)
for limit in (1, 2):
    module.num_threads, module.threading = limit, "openmp"
    try:
        module.decode(*inputs.arguments, out=out)
    except RuntimeError as error:
        assert str(error).startswith("threading: expected a loaded OpenMP runtime for 'openmp'"), error
    else:
        raise AssertionError("no error")
assert (out == 7).all()
ctypes.CDLL(runtime_path)
assert_same(decode(), expected)
""")


def test_the_runtime_of_the_global_scope_comes_first(run, libgomp):
    """As torch's is, or one that is preloaded, whichever was loaded before."""
    run(
        """
ctypes.CDLL(runtime_path)
assert module.openmp == runtime_path
other = ctypes.CDLL(LIBGOMP, mode=ctypes.RTLD_GLOBAL)
other.omp_set_num_threads(2)
assert os.path.basename(module.openmp).startswith("libgomp"), module.openmp
assert_same(decode(num_threads=2), expected)
""".replace("LIBGOMP", repr(libgomp))
    )


def test_fork_after_a_call_on_a_team(run, libgomp):
    """A child, and a child of its own, get the same bits on threads of their own, and the parent keeps its team."""
    run(
        """
runtime = ctypes.CDLL(runtime_path)
runtime.omp_set_num_threads(2)

def check():
    assert module.openmp is None
    assert_same(decode(), expected)
    try:
        decode(threading="openmp")
    except RuntimeError as error:
        assert "got a child of fork()" in str(error), error
    else:
        raise AssertionError("no error")
    module.threading = "auto"

def with_a_child_of_its_own():
    check()
    in_a_child(check)

for _ in range(3):
    assert_same(decode(num_threads=2), expected)
    in_a_child(with_a_child_of_its_own)
    assert module.openmp is not None
assert_same(decode(), expected)
""",
        runtime=libgomp,
    )


def test_a_library_that_is_loaded_in_a_child_of_fork(run, libgomp):
    """The parent's team is not in the child, and what the runtime keeps says that it is. So the child takes its own."""
    run(
        """
runtime = ctypes.CDLL(runtime_path)
runtime.omp_set_num_threads(2)
region(runtime, lambda: None)
library = bytearray(open(sys.argv[2], "rb").read())

def check():
    import pa_compiler.runtime.loader
    pa_compiler.runtime.loader._LOADED.clear()  # a copy with run-time state of its own
    again = pa_compiler.load(sys.argv[2])
    again.num_threads = 2
    assert again.openmp is None
    assert_same(again.decode(*inputs.arguments, return_lse=True), expected)

in_a_child(check)
""",
        runtime=libgomp,
    )


def test_a_call_inside_a_parallel_region(run, libgomp):
    run(
        """
runtime = ctypes.CDLL(runtime_path)
runtime.omp_set_num_threads(2)
module.num_threads = 2
failures = []

def body():
    try:
        assert module.openmp is None
        assert_same(decode(), expected)
    except BaseException as error:
        failures.append(error)

region(runtime, body)
assert not failures, failures
""",
        runtime=libgomp,
    )


@pytest.mark.scorecard(16)
def test_calls_at_once_beside_a_runtime(run, libgomp, count, figure):
    """From 16 threads: one at a time is on a team, the others on the pool."""
    calls = count(10, 300)
    program = f"""
runtime = ctypes.CDLL(runtime_path)
runtime.omp_set_num_threads(2)
module.num_threads = 2
together, failures = threading.Barrier(16), []

def call_again_and_again():
    runtime.omp_set_num_threads(2)
    together.wait()
    try:
        for _ in range({calls}):
            assert_same(decode(), expected)
    except BaseException as error:
        failures.append(error)

callers = [threading.Thread(target=call_again_and_again) for _ in range(16)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert not failures, failures
"""
    run(program, runtime=libgomp)
    figure("calls", 16 * calls)


@pytest.mark.scorecard(8)
def test_a_teams_floating_point_state_does_not_matter(run, libgomp, figure):
    """Its threads begin with that of who starts them, here with subnormal numbers taken for 0, and keep it."""
    run(
        """
from test_floating_point_state import DENORMALS_ARE_ZERO, FLUSH_TO_ZERO, control, mxcsr
inputs.value_cache[...] *= np.float32(2.0**-120)
expected = decode(num_threads=1)
runtime = ctypes.CDLL(runtime_path)
runtime.omp_set_num_threads(2)
states = []
with mxcsr(FLUSH_TO_ZERO | DENORMALS_ARE_ZERO):
    region(runtime, lambda: states.append(control()))
    for _ in range(5):
        assert_same(decode(num_threads=2), expected)
    region(runtime, lambda: states.append(control()))
assert len(states) == 4 and len(set(map(tuple, states))) == 1, states
""",
        runtime=libgomp,
    )
    figure("states compared", 4)


BOUND_CALLER = """
cpus = os.sched_getaffinity(0)
first = min(cpus)
hold = threading.Event()
threading.Thread(target=hold.wait, daemon=True).start()  # a thread that nobody binds
os.sched_setaffinity(0, {first})
again = pa_compiler.load(sys.argv[2])
assert again.cpus == cpus and again.num_threads == len(cpus), (again.cpus, again.num_threads)
before = set(os.listdir("/proc/self/task"))

def decode_until_a_thread_of_the_pool_is_bound_to(wanted):
    for _ in range(10000):  # a thread that comes late finds its work done, and is not bound
        assert_same(again.decode(*inputs.arguments, return_lse=True), expected)
        pool = set(os.listdir("/proc/self/task")) - before
        if pool and all(os.sched_getaffinity(int(task)) == wanted for task in pool):
            return
    raise AssertionError({task: os.sched_getaffinity(int(task)) for task in pool})

again.num_threads = 2
decode_until_a_thread_of_the_pool_is_bound_to(cpus)
assert os.sched_getaffinity(0) == {first}
again.cpus = {first}
decode_until_a_thread_of_the_pool_is_bound_to({first})
hold.set()
"""


def test_a_bound_caller_does_not_bind_the_pool(run):
    """The process's CPUs count, not those of the thread that makes the module and calls it."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: a caller that is bound to it loses none")
    run("import warnings; warnings.simplefilter('ignore')\n" + BOUND_CALLER)


def test_a_process_on_one_cpu_has_one_thread(run):
    """Without a warning, until somebody asks for more threads, and then once."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: the process has no other")
    out = run(
        """
import warnings
for task in os.listdir("/proc/self/task"):
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
