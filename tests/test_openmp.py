"""Calls on the team of an OpenMP runtime, and where a call takes threads of its own instead.

tests/support/openmp.cc is a runtime whose answers a test sets.
"""

from __future__ import annotations

import pytest
from specs import every_spec


@every_spec
def test_the_same_bits_on_a_team(in_a_process, libgomp, spec, pipeline):
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
    in_a_process(before + program, spec, pipeline, libgomp)


def test_what_a_team_is_asked_for(in_a_process):
    """All of its threads, in one region for each parallel call; none for a call that one thread does as soon."""
    in_a_process("""
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


def test_where_a_call_takes_threads_of_its_own(in_a_process):
    """A team of one, a parallel region around the call, CPUs that were set, and "own"."""
    in_a_process("""
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


def test_a_runtime_that_lacks_a_function_is_none(in_a_process):
    in_a_process(
        """
ctypes.CDLL(runtime_path)
assert module.openmp is None
assert_same(decode(num_threads=2), expected)
""",
        runtime="incomplete",
    )


def test_openmp_where_there_is_no_runtime(in_a_process):
    """Nothing is written, whatever the size of the call."""
    in_a_process("""
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


def test_the_runtime_of_the_global_scope_comes_first(in_a_process, libgomp):
    """As torch's is, or one that is preloaded, whichever was loaded before."""
    in_a_process(
        """
ctypes.CDLL(runtime_path)
assert module.openmp == runtime_path
other = ctypes.CDLL(LIBGOMP, mode=ctypes.RTLD_GLOBAL)
other.omp_set_num_threads(2)
assert os.path.basename(module.openmp).startswith("libgomp"), module.openmp
assert_same(decode(num_threads=2), expected)
""".replace("LIBGOMP", repr(libgomp))
    )


def test_fork_after_a_call_on_a_team(in_a_process, libgomp):
    """A child, and a child of its own, get the same bits on threads of their own, and the parent keeps its team."""
    in_a_process(
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


def test_a_library_that_is_loaded_in_a_child_of_fork(in_a_process, libgomp):
    """The parent's team is not in the child, and what the runtime keeps says that it is. So the child takes its own."""
    in_a_process(
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


def test_a_call_inside_a_parallel_region(in_a_process, libgomp):
    in_a_process(
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
def test_calls_at_once_beside_a_runtime(in_a_process, libgomp, count, figure):
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
    in_a_process(program, runtime=libgomp)
    figure("calls", 16 * calls)


@pytest.mark.scorecard(8)
def test_a_teams_floating_point_state_does_not_matter(in_a_process, libgomp, figure):
    """Its threads begin with that of who starts them, here with subnormal numbers taken for 0, and keep it."""
    in_a_process(
        """
from floating_point import DENORMALS_ARE_ZERO, FLUSH_TO_ZERO, control, mxcsr
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
