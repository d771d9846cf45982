"""Many threads and processes that compile at once: nothing crashes, and each spec is built once."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from inputs import make_inputs
from tolerances import assert_close_to_oracle

import pa_compiler
from pa_compiler import PagedAttentionSpec, cache, turns

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")
THREADS = 24

COMPILE = """
import concurrent.futures, pa_compiler
spec = pa_compiler.PagedAttentionSpec(3, 1, 4, 2, "float32")
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    modules = list(pool.map(lambda _: pa_compiler.compile(spec), range(16)))
assert len({module.manifest.kernels for module in modules}) == 1
"""


def small_specs():
    """Specs of every type, out type and strategy, quick to compile."""
    dtypes = ("float32", "float16", "bfloat16")
    for head_dim, dtype, out_dtype, num_heads in itertools.product((4, 16), dtypes, dtypes, (3, 16)):
        yield PagedAttentionSpec(num_heads, 1, head_dim, 4, dtype, out_dtype)


def compile_at_once(specs, **arguments):
    """Compile in 24 threads that start together, whose specs these are in turn."""
    start = threading.Barrier(THREADS)

    def compile_one(spec):
        start.wait()
        return pa_compiler.compile(spec, **arguments)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(compile_one, itertools.islice(itertools.cycle(specs), THREADS)))


@pytest.mark.scorecard(17)
def test_threads_compile_at_once(own_cache, count, figure):
    """Two rounds build every spec, by each pipeline; the others find them in the cache. What is damaged there does not
    reach what runs."""
    specs = list(itertools.islice(small_specs(), count(2, THREADS)))
    for pipeline in ("fused", "staged")[: count(1, 2)]:
        for spec, module in zip(specs, compile_at_once(specs, pipeline=pipeline), strict=False):
            inputs = make_inputs(spec, [0, 1, 5])
            assert module.spec == spec
            assert_close_to_oracle(spec, inputs, module.decode(*inputs.arguments))
    rounds = count(4, 48)
    for _ in range(rounds):
        modules = compile_at_once(specs)
        assert [module.spec for module in modules[: len(specs)]] == specs
    assert str(own_cache) not in Path("/proc/self/maps").read_text()
    figure("rounds of 24 threads", rounds + count(1, 2))
    figure("of them building", count(1, 2))


@pytest.mark.scorecard(19)
def test_processes_and_threads_ask_for_one_spec(own_cache, tmp_path, count, figure):
    """The C++ compiler is started twice for a build, to compile and to link."""
    log, compiler = tmp_path / "log", tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler)}
    number = count(2, 8)
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE], env=environment) for _ in range(number)]
    assert [process.wait() for process in processes] == [0] * number
    calls = log.read_text().splitlines()
    assert ["-shared" in call for call in calls] == [False, True]
    assert len([path for path in own_cache.iterdir() if path.is_dir()]) == 1
    figure("askers", number * 16)
    figure("builds", len(calls) // 2)


def test_clear_waits_for_a_build(own_cache):
    """It would take the files away under it, and its lock."""
    name = cache.key({"of": "this test"})
    building, cleared = threading.Event(), threading.Event()

    def build(directory):
        building.set()
        assert not cleared.wait(0.2)
        (directory / "pa.so").write_bytes(b"library")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        built = pool.submit(cache.get_or_build, name, build)
        building.wait()
        pool.submit(lambda: (cache.clear(), cleared.set())).result()
        assert built.result() == {"pa.so": b"library"}
    assert not (own_cache / name).exists()


def test_a_child_of_fork_does_not_wait_for_its_parents_threads():
    with turns.turn(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork in a process with threads
        child = os.fork()
        if child == 0:
            os._exit(0 if turns.turn().acquire(timeout=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
