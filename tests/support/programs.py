"""Programs that load an OpenMP runtime, bind threads or fork, each in a process of its own: conftest.py's fixtures."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from specs import BASE

PREAMBLE = """
import contextlib, ctypes, os, signal, sys, threading
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
def in_a_process(compiled, tmp_path, fake_runtimes):
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
