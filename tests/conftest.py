"""Compiled modules, kept for the session: most of a test's time would be the compiler's."""

from __future__ import annotations

import functools
import json
import os

import pytest

import pa_compiler


@pytest.fixture(scope="session", autouse=True)
def build_cache(tmp_path_factory):
    """One build cache for all of this run's processes and none of the user's, so that nothing old is tested."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PA_CACHE_DIR", str(shared / "build-cache"))
        patch.delenv("PA_NUM_THREADS", raising=False)
        yield shared / "build-cache"


@pytest.fixture(scope="session")
def compiled(build_cache):
    """compiled(spec, pipeline="fused", target="llvm") -> Module, the same one each time."""

    @functools.cache
    def compile_once(spec, pipeline, target_text):
        with pytest.MonkeyPatch.context() as patch:  # a test may have turned PA_CACHE_DIR to a directory of its own
            patch.setenv("PA_CACHE_DIR", str(build_cache))
            return pa_compiler.compile(spec, target=json.loads(target_text), pipeline=pipeline)

    def compile_module(spec, pipeline="fused", target="llvm"):
        module = compile_once(spec, pipeline, json.dumps(target))
        module.num_threads = 2
        return module

    return compile_module


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache directory of the test's own, not made yet."""
    monkeypatch.setenv("PA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
