"""Compiled modules, kept for the session: most of a test's time would be the compiler's."""

from __future__ import annotations

import functools
import json
import os

import bundles
import cuda_driver
import cuda_emulator
import gpu_memory
import pytest
import record
import scorecard
from programs import fake_runtimes, in_a_process, libgomp  # noqa: F401  (fixtures)
from specs import BASE
from through_c import Twin

import pa_compiler
from pa_compiler import artifact, compiler

WARNINGS = "-Wall -Wextra -Werror -Wno-unused-const-variable"  # of constants, which clang wants to be used


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the full counts of the scorecard, and write RELIABILITY.md")
    parser.addoption(
        "--through-c", metavar="CPU", help="calls through a bundle's C interface too: llvm, x86-64-v3, ..."
    )
    parser.addoption("--gpu", action="store_true", help="run tests marked gpu on this machine's GPU: with -m gpu")
    parser.addoption("--record", metavar="FILE", help="keep each test's outcome, date and versions in a file")


def pytest_configure(config):
    if (path := config.getoption("--record")) and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(record.Recorder(path))


@pytest.fixture
def count(request):
    """count(fast, full) -> cases that a test draws: full with --soak."""
    return lambda fast, full: full if request.config.getoption("--soak") else fast


@pytest.fixture
def figure(request):
    """figure(what, number, worst=False): what a test has measured. Of several tests the sum counts, or the worst."""

    def figure(what, number, worst=False):
        request.node.user_properties.append(("figure", (what, number, worst)))

    return figure


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Every report says which item of the scorecard its test belongs to."""
    mark = item.get_closest_marker("scorecard")
    if mark and call.when == "setup":
        item.user_properties.append(("scorecard", mark.args[0]))
    return (yield)


def pytest_terminal_summary(terminalreporter, config):
    """Print the figures by item; with --soak write them to RELIABILITY.md."""
    figures, failed = {}, set()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = getattr(report, "user_properties", []) if report.when == "call" or outcome != "passed" else []
            for item in {value for name, value in properties if name == "scorecard"}:
                numbers = figures.setdefault(item, {})
                for what, number, worst in (value for name, value in properties if name == "figure"):
                    numbers[what] = max(numbers.get(what, number), number) if worst else numbers.get(what, 0) + number
                if outcome != "passed":
                    failed.add(item)
    if not figures:
        return
    terminalreporter.section("scorecard")
    for item, numbers in sorted(figures.items()):
        verdict = "FAILED " if item in failed else ""
        terminalreporter.write_line(f"{item:2} {scorecard.ITEMS[item]}: {verdict}{scorecard.text(numbers)}")
    if config.getoption("--soak"):
        scorecard.record(figures, failed)


@pytest.fixture(scope="session", autouse=True)
def build_cache(tmp_path_factory):
    """One build cache for all of this run's processes and none of the user's, so that nothing old is tested.

    What the C++ compiler warns of in a host is an error here, and nowhere else.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PA_CACHE_DIR", str(shared / "build-cache"))
        patch.setenv("CXX", f"{os.environ.get('CXX', '').strip() or 'g++'} {WARNINGS}")
        patch.delenv("PA_NUM_THREADS", raising=False)
        yield shared / "build-cache"


@pytest.fixture(scope="session")
def compiled(build_cache, request):
    """compiled(spec, pipeline="fused", target="llvm", attend=False, **extras) -> Module, the same each time.

    Without attend it is there in half the time. extras are compile's words for other entry points. With --through-c it
    is a Twin, for that CPU where none is said.
    """
    through_c = request.config.getoption("--through-c")

    @functools.cache
    def compile_once(spec, pipeline, target_text, **extras):
        with pytest.MonkeyPatch.context() as patch:  # a test may have turned PA_CACHE_DIR to a directory of its own
            patch.setenv("PA_CACHE_DIR", str(build_cache))
            target = json.loads(target_text)
            if not through_c or pipeline != "fused" or target != "llvm":
                return pa_compiler.compile(spec, target=target, pipeline=pipeline, **extras)
            target = target if through_c == "llvm" else {"kind": "llvm", "mcpu": through_c}
            return Twin(pa_compiler.compile(spec, target=target, **extras), target)

    def compile_module(spec, pipeline="fused", target="llvm", attend=False, **extras):
        module = compile_once(spec, pipeline, json.dumps(target), attend=attend, **extras)
        module.num_threads = 2
        return module

    return compile_module


@pytest.fixture(scope="session")
def bundle(build_cache):
    """The folder of a bundle of bundles.SPECS, the same for all of this run's processes."""
    return bundles.built(build_cache.with_name("bundle"), bundles.SPECS.values(), bundles.TARGETS)


@pytest.fixture(scope="session")
def other_bundle(build_cache):
    """The folder of another one, with one of these specs, which needs more of a CPU, or less."""
    return bundles.built(build_cache.with_name("other-bundle"), [bundles.SPECS["float32"]], bundles.OTHER_TARGETS)


@pytest.fixture(scope="session")
def emulated(build_cache):
    """emulated(CUDA C) -> its kernels by name, which run on the CPU."""
    directory = build_cache.with_name("emulated")
    directory.mkdir(exist_ok=True)
    return functools.partial(cuda_emulator.load, directory=directory)


@pytest.fixture(scope="session")
def cuda_decode(emulated):
    """cuda_decode(spec, **sizes of the tiling) -> CUDA kernels of decode on the emulator, the same ones each time."""
    import cuda_kernels  # which imports TVM

    return functools.cache(functools.partial(cuda_kernels.build_decode, emulated))


@pytest.fixture(scope="session")
def cuda_attend(emulated):
    """cuda_attend(spec, **sizes of the tiling) -> CUDA kernels of attend on the emulator, the same ones each time."""
    import cuda_kernels  # which imports TVM

    return functools.cache(functools.partial(cuda_kernels.build_attend, emulated))


@pytest.fixture(scope="session")
def gpu_module(emulated, request):
    """gpu_module(spec, pipeline="fused", **extras) -> CudaModule with the emulator's kernels, for the fake driver.

    They are kept in a cache of their own: to the cache they look like those that nvcc makes. With --gpu nvcc does.
    """
    directory = emulated.keywords["directory"]
    kept = directory / "modules"
    if request.config.getoption("--gpu"):
        target = {"kind": "cuda", "arch": gpu_memory.arch()}
        return functools.cache(
            lambda spec, pipeline="fused", **extras: pa_compiler.compile(
                spec, target, pipeline, **{"attend": False} | extras
            )
        )

    def compile_module(spec, pipeline="fused", arch="sm_90", attend=False, merge_states=False):
        with pytest.MonkeyPatch.context() as patch:
            cuda_driver.emulate(patch, directory)
            patch.setenv("PA_CACHE_DIR", str(kept))
            target = {"kind": "cuda", "arch": arch}
            return pa_compiler.compile(spec, target, pipeline, attend=attend, merge_states=merge_states)

    return compile_module


@pytest.fixture
def gpu(emulated):
    """The fake driver, which has nothing left of other tests, and nothing to complain about after this one."""
    fake = cuda_driver.driver(emulated.keywords["directory"])
    yield fake
    fake.release()
    fake.set_order("forward")
    fake.log()
    assert fake.contexts_pushed() == 0


@pytest.fixture
def memory(request):
    """The memory of a GPU, real or not."""
    if request.config.getoption("--gpu"):
        return gpu_memory.real_memory()
    return gpu_memory.FakeMemory(request.getfixturevalue("gpu"))


@pytest.fixture
def faked_builds(compiled, monkeypatch):
    """The builds that compile() asks for, which give it a library that is there already."""
    module, asked = compiled(BASE), []

    def build(spec, config, pipeline, attend, directory):
        asked.append((spec, config, pipeline))
        module.save(directory / "pa.so")
        for stage, text in module.sources.items():
            (directory / artifact.STAGE_FILES[stage]).write_text(text)

    monkeypatch.setattr(compiler, "_build", build)
    return asked


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache directory of the test's own, not made yet."""
    monkeypatch.setenv("PA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
