"""What compile() finds in the build cache, and what makes it miss."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import os
import platform
import random
import shutil
import subprocess
import sys

import pytest
from specs import BASE

import pa_compiler
from pa_compiler import PagedAttentionSpec, backends, dependencies, installation
from pa_compiler import store as cache
from pa_compiler.cuda import build as cuda_build
from pa_compiler.runtime import cpu_features

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")

COMPILE = "import sys, pa_compiler; pa_compiler.compile(pa_compiler.PagedAttentionSpec(3, 1, 4, 2, 'float32'));"


@pytest.fixture
def builds(faked_builds, own_cache):
    """Builds for a cache of the test's own."""
    return faked_builds


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
    **{name: {name: 8} for name in ("num_heads", "head_dim", "block_size", "head_tile", "batch_chunk", "value_dim")},
    **{name: {name: 8} for name in ("window", "softcap")},
    **{name: {name: True} for name in ("shared_kv", "alibi", "sinks", "invariant")},
    **{name: {name: "float16"} for name in ("dtype", "out_dtype")},
    **{name: {name: value} for name, value in (("num_kv_heads", 1), ("kv_layout", "HND"), ("kv_dtype", "int8"))},
    "kv_scale": {"kv_dtype": "float8_e5m2", "kv_scale": "head"},
    "kv_rotation": {"kv_dtype": "int8", "kv_rotation": "hadamard", "head_dim": 32},
    "kv_dots": {"kv_dtype": "int4", "kv_dots": "int8", "head_dim": 32},
    "score_mod": {"score_mod": lambda score, *_: 2.0 * score},
    "mask_mod": {"mask_mod": lambda batch, head, query_pos, key_pos: key_pos % 2 == 0},
    "inputs": {"score_mod": lambda score, *_, bias: score + bias[0], "inputs": {"bias": ("float32", (1,))}},
}


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_field_of_the_spec_misses(builds, change, figure, monkeypatch):
    assert len(CHANGES) == len(dataclasses.fields(BASE))
    any_spec = backends.BACKENDS["llvm"]()._replace(check=lambda *_: None)  # nothing is built
    monkeypatch.setitem(backends.BACKENDS, "llvm", lambda: any_spec)
    pa_compiler.compile(BASE)
    pa_compiler.compile(dataclasses.replace(BASE, **change))
    assert len(builds) == 2
    figure("changed inputs", 1)


@pytest.mark.scorecard(23)
@pytest.mark.parametrize(
    "arguments",
    [
        {"pipeline": "staged"},
        {"target": {"kind": "llvm", "mcpu": "x86-64-v3"}},
        {"target": {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["-fma"]}},
    ],
    ids=["pipeline", "mcpu", "mattr"],
)
def test_pipeline_and_target_miss(builds, arguments, figure):
    for _ in range(2):
        pa_compiler.compile(BASE)
        pa_compiler.compile(BASE, target={"kind": "llvm", "mcpu": "x86-64"})
        pa_compiler.compile(BASE, **arguments)
    assert len(builds) == 3
    figure("changed inputs", 1)


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("package", ["apache-tvm", "apache-tvm-ffi", "pa-compiler", "jinja2"])
def test_other_versions_miss(builds, monkeypatch, figure, package):
    pa_compiler.compile(BASE)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == package else version(name))
    pa_compiler.compile(BASE)
    assert len(builds) == 2
    figure("changed inputs", 1)


@pytest.mark.scorecard(23)
@pytest.mark.parametrize(
    "variable", ["CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "LD_RUN_PATH"]
)
def test_what_the_cxx_compiler_reads_from_the_environment_misses(builds, monkeypatch, figure, variable):
    pa_compiler.compile(BASE)
    monkeypatch.setenv(variable, "/elsewhere")
    pa_compiler.compile(BASE)
    monkeypatch.delenv(variable)
    pa_compiler.compile(BASE)
    assert len(builds) == 2
    figure("changed inputs", 1)


@pytest.mark.scorecard(23)
def test_another_cxx_compiler_misses(builds, tmp_path, monkeypatch, figure):
    """Another path, another size, another time: as a new version has."""
    compiler = tmp_path / "g++"
    shutil.copy(shutil.which("g++"), compiler)
    pa_compiler.compile(BASE)
    monkeypatch.setenv("CXX", str(compiler))
    pa_compiler.compile(BASE)
    compiler.write_bytes(compiler.read_bytes() + b"\0")
    pa_compiler.compile(BASE)
    os.utime(compiler, (0, 0))
    pa_compiler.compile(BASE)
    assert len(builds) == 4
    figure("changed inputs", 3)


@pytest.mark.scorecard(26)
def test_without_a_compiler_what_another_has_built_is_taken(builds, own_cache, monkeypatch, figure):
    """The newest entry that is whole; what was never built is an error that names the compiler."""
    first = shutil.which("g++")
    for cxx in (first, f"{first} -m64"):
        monkeypatch.setenv("CXX", cxx)
        built = pa_compiler.compile(BASE)
    for missing in ("no-such-compiler", "no-such-launcher g++"):
        monkeypatch.setenv("CXX", missing)
        taken = pa_compiler.compile(BASE)
        assert (taken._library, taken.sources, len(builds)) == (built._library, built.sources, 2)
        for others in ({"spec": dataclasses.replace(BASE, num_heads=8)}, {"spec": BASE, "pipeline": "staged"}):
            with pytest.raises(RuntimeError, match=r"the C\+\+ compiler 'no-such-.*' is not on PATH"):
                pa_compiler.compile(**others)
        figure("compilers", 1)
    older, newer = sorted(entries(own_cache), key=lambda entry: entry.stat().st_mtime)
    (newer / "pa.so").write_bytes(b"damaged")
    assert pa_compiler.compile(BASE)._library == built._library
    (older / "pa.so").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="is not on PATH"):
        pa_compiler.compile(BASE)
    assert len(builds) == 2


@pytest.mark.scorecard(26)
def test_without_nvcc_what_another_has_built_is_taken(builds, monkeypatch, figure):
    spec = dataclasses.replace(BASE, head_dim=16)
    monkeypatch.setattr(cuda_build, "tool", lambda name: f"/found/{name}")
    pa_compiler.compile(spec, "cuda")

    def missing(name):
        raise RuntimeError(f"no {name}")

    monkeypatch.setattr(cuda_build, "tool", missing)
    pa_compiler.compile(spec, "cuda")
    assert len(builds) == 1
    with pytest.raises(RuntimeError, match="no nvcc"):
        pa_compiler.compile(spec, {"kind": "cuda", "arch": "sm_80"})
    figure("compilers", 1)


@pytest.mark.scorecard(23)
def test_another_cpu_misses(builds, monkeypatch, figure):
    """Each feature that Linux names, and what else identifies a CPU: none is left out of the key."""
    cpu = cpu_features.cpuinfo()
    flags = cpu["flags"].split()
    others = [{**cpu, "flags": " ".join(flag for flag in flags if flag != without)} for without in flags]
    others += [{**cpu, field: "other"} for field in ("vendor_id", "cpu family", "model", "stepping")]
    keys = set()
    for other in (cpu, *others):
        monkeypatch.setattr(cpu_features, "cpuinfo", lambda other=other: other)
        keys.add(cache.key(dependencies.inputs(BASE, backends.normalize("llvm"), "fused")))
    assert len(keys) == 1 + len(others)
    pa_compiler.compile(BASE)
    monkeypatch.setattr(cpu_features, "cpuinfo", lambda: cpu)
    pa_compiler.compile(BASE)
    assert len(builds) == 2
    figure("changed inputs", len(others))


@pytest.mark.scorecard(23)
@pytest.mark.parametrize("given", ["llvm", {"kind": "llvm", "mcpu": "x86-64"}], ids=["llvm", "mcpu"])
def test_another_architecture_misses(builds, monkeypatch, figure, given):
    pa_compiler.compile(BASE, target=given)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setenv("CXX_x86_64", "g++")  # a compiler there, for what is said to be of x86-64
    pa_compiler.compile(BASE, target=given)
    assert len(builds) == 2
    figure("changed inputs", 1)


@pytest.mark.scorecard(23)
def test_another_python_misses(builds, monkeypatch, figure):
    pa_compiler.compile(BASE)
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "0", "0"))
    pa_compiler.compile(BASE)
    assert len(builds) == 2
    figure("changed inputs", 1)


def test_other_text_misses(builds, monkeypatch):
    pa_compiler.compile(BASE)
    monkeypatch.setattr(installation, "text_digest", lambda: "other")
    pa_compiler.compile(BASE)
    assert len(builds) == 2


EVERY_FILE_COUNTS = """
import pathlib, sys
from pa_compiler.installation import text_digest
unchanged = text_digest()
files = [path for path in pathlib.Path(sys.argv[1]).rglob("*") if path.suffix in (".py", ".j2", ".h")]
for path in files:
    text = path.read_bytes()
    path.write_bytes(text + b"\\n")
    assert text_digest() != unchanged, path
    path.write_bytes(text)
assert text_digest() == unchanged
print(len(files))
"""


@pytest.mark.scorecard(23)
def test_the_text_of_every_kernel_schedule_and_template_counts(tmp_path, figure):
    """In a copy of the package, laid out as the wheel has it, and in folders below it that there may be one day."""
    for package in ("pa_compiler", "pa_compiler.schedules", "pa_compiler.templates"):
        copy = tmp_path / package.replace(".", "/")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(importlib.resources.files(package), copy, ignore=ignored, dirs_exist_ok=True)
    for name in ("new/part.py", "kernels/new/deeper/kernel.py", "schedules/new/strategy.py", "templates/new/pool.h"):
        file = tmp_path / "pa_compiler" / name
        file.parent.mkdir(parents=True)
        file.write_text("one\n")
    command = [sys.executable, "-c", EVERY_FILE_COUNTS, str(tmp_path / "pa_compiler")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    counted = subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert int(counted) > 20
    figure("changed inputs", int(counted))


def flip(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def fill_with_zeros(content, rng):
    start = rng.choice([place for place in rng.sample(range(len(content)), 64) if content[place]])
    end = rng.randint(start + 1, len(content))
    return content[:start] + bytes(end - start) + content[end:]


@pytest.mark.scorecard(22)
def test_every_damage_to_an_entry_is_noticed(builds, own_cache, count, figure):
    """To each of its files, digests.json too: it is built again, and never loaded."""
    rng = random.Random(0)
    whole = pa_compiler.compile(BASE)
    (entry,) = entries(own_cache)
    for i in range(count(63, 1008)):
        file = sorted(entry.iterdir())[i % 7]
        damage = (flip, cut, fill_with_zeros)[i // 7 % 3]
        file.write_bytes(damage(file.read_bytes(), rng))
        module = pa_compiler.compile(BASE)
        assert len(builds) == i + 2, f"{damage.__name__} {file.name}"
        assert (module._library, module.sources) == (whole._library, whole.sources)
    figure("damages", count(63, 1008))
