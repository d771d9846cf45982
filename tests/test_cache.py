"""What compile() finds in the build cache, and what makes it miss."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys

import pytest
from inputs import make_inputs
from specs import BASE
from tolerances import assert_close_to_oracle

import pa_compiler
from pa_compiler import PagedAttentionSpec, compiler

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")

COMPILE = "import sys, pa_compiler; pa_compiler.compile(pa_compiler.PagedAttentionSpec(3, 1, 4, 2, 'float32'));"


@pytest.fixture
def builds(compiled, own_cache, monkeypatch):
    """The builds that compile() asks for, which give it a library that is there already."""
    module, asked = compiled(BASE), []

    def build(spec, config, pipeline, directory):
        asked.append((spec, config, pipeline))
        module.save(directory / "pa.so")
        for stage, file in compiler.STAGE_FILES.items():
            (directory / file).write_text(module.sources[stage])

    monkeypatch.setattr(compiler, "_build", build)
    return asked


def entries(own_cache):
    return sorted(path for path in own_cache.iterdir() if path.is_dir())


def test_another_process_gets_the_entry_without_tvm(own_cache):
    module = pa_compiler.compile(SPEC)
    (entry,) = entries(own_cache)
    before = (entry / "pa.so").stat()
    subprocess.run([sys.executable, "-c", COMPILE + "assert 'tvm' not in sys.modules"], check=True)
    assert pa_compiler.compile(SPEC).sources == module.sources
    assert entries(own_cache) == [entry]
    after = (entry / "pa.so").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_two_processes_at_once(own_cache):
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(entries(own_cache)) == 1
    inputs = make_inputs(SPEC, [0, 1, 5])
    assert_close_to_oracle(SPEC, inputs, pa_compiler.compile(SPEC).decode(*inputs.arguments))


def test_without_the_cache_nothing_is_looked_up_or_left(own_cache, builds):
    for _ in range(2):
        pa_compiler.compile(BASE, cache=False)
    assert len(builds) == 2
    assert not own_cache.exists() or not entries(own_cache)


def test_same_call_hits(own_cache, builds):
    pa_compiler.compile(BASE)
    pa_compiler.compile(BASE, target="llvm", pipeline="fused", cache=True)
    pa_compiler.compile(dataclasses.replace(BASE, out_dtype=BASE.dtype))
    assert len(builds) == len(entries(own_cache)) == 1


CHANGES = {
    "num_heads": {"num_heads": 8},
    "num_kv_heads": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 8},
    "block_size": {"block_size": 8},
    "dtype": {"dtype": "float16"},
    "out_dtype": {"out_dtype": "float16"},
    "kv_layout": {"kv_layout": "HND"},
    "head_tile": {"head_tile": 8},
    "batch_chunk": {"batch_chunk": 8},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_field_of_the_spec_misses(builds, change):
    assert len(CHANGES) == len(dataclasses.fields(BASE))
    pa_compiler.compile(BASE)
    pa_compiler.compile(dataclasses.replace(BASE, **change))
    assert len(builds) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"pipeline": "staged"},
        {"target": {"kind": "llvm", "mcpu": "x86-64-v3"}},
        {"target": {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["-fma"]}},
    ],
    ids=["pipeline", "mcpu", "mattr"],
)
def test_pipeline_and_target_miss(builds, arguments):
    for _ in range(2):
        pa_compiler.compile(BASE)
        pa_compiler.compile(BASE, target={"kind": "llvm", "mcpu": "x86-64"})
        pa_compiler.compile(BASE, **arguments)
    assert len(builds) == 3


@pytest.mark.parametrize("package", ["apache-tvm", "apache-tvm-ffi"])
def test_other_versions_miss(builds, monkeypatch, package):
    pa_compiler.compile(BASE)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == package else version(name))
    pa_compiler.compile(BASE)
    assert len(builds) == 2


def test_other_text_misses(builds, monkeypatch):
    pa_compiler.compile(BASE)
    monkeypatch.setattr(compiler, "text_digest", lambda: "other")
    pa_compiler.compile(BASE)
    assert len(builds) == 2


EVERY_FILE_COUNTS = """
import pathlib, sys
from pa_compiler.compiler import text_digest
unchanged = text_digest()
files = [path for path in pathlib.Path(sys.argv[1]).rglob("*") if path.suffix in (".py", ".j2")]
for path in files:
    text = path.read_bytes()
    path.write_bytes(text + b"\\n")
    assert text_digest() != unchanged, path
    path.write_bytes(text)
assert text_digest() == unchanged
print(len(files))
"""


def test_the_text_of_every_kernel_schedule_and_template_counts(tmp_path):
    """In a copy of the package, laid out as the wheel has it."""
    for package in ("pa_compiler", "pa_compiler.schedules", "pa_compiler.templates"):
        copy = tmp_path / package.replace(".", "/")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(importlib.resources.files(package), copy, ignore=ignored, dirs_exist_ok=True)
    command = [sys.executable, "-c", EVERY_FILE_COUNTS, str(tmp_path / "pa_compiler")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    counted = subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert int(counted) > 20
