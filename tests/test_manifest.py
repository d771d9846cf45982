"""What a library says of itself: read without loading it, checked before anything of it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tvm_ffi
from builds import build_library
from click.testing import CliRunner
from inputs import make_inputs
from specs import BASE, SPECS, every_spec
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import artifact, backends
from pa_compiler import store as cache
from pa_compiler.cli import main as cli
from pa_compiler.cpu import target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.runtime import cpu_features, loader, manifest

V3 = ("avx", "avx2", "bmi", "bmi2", "cmov", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf", "sse", "sse2", "sse3")
V3 += ("sse4.1", "sse4.2", "ssse3")
HASWELL = "sse sse2 pni ssse3 sse4_1 sse4_2 cmov popcnt movbe lahf_lm abm bmi1 bmi2 avx avx2 f16c fma"


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory):
    """The bytes of a saved library."""
    path = tmp_path_factory.mktemp("library") / "pa.so"
    compiled(BASE).save(path)
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(bytes, match): load() refuses such a file, naming it, and gives nothing to the system's loader."""

    def check(contents, match):
        path = tmp_path / "refused.so"
        path.write_bytes(contents)
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_opened", lambda *_: pytest.fail("it was loaded"))
            with pytest.raises(RuntimeError, match=rf"(?s)^{path}: .*{match}"):
                pa_compiler.load(path)

    return check


def body(library):
    """The ELF file of a library."""
    length, *_ = manifest._FOOTER.unpack(library[-manifest._FOOTER.size :])
    return library[: -manifest._FOOTER.size - length]


def sealed_again(library, **changes):
    return manifest.seal(body(library), dataclasses.replace(manifest.read(library, "it"), **changes))


@every_spec
def test_says_what_it_was_made_from(compiled, spec, pipeline):
    module = compiled(spec, pipeline)
    about = module.manifest
    assert (about.spec, about.pipeline, about.target) == (spec, pipeline, module.target)
    assert (about.lse, about.empty_rows) == ("natural logarithm", "out 0, lse -inf")
    with_sinks = dataclasses.replace(about, spec=dataclasses.replace(spec, sinks=True), empty_rows="")
    assert with_sinks.empty_rows == "out 0, lse the sink"
    assert about.kernels == hashlib.sha256(module.sources["asm"].encode()).hexdigest()
    assert set(about.versions) == {"pa-compiler", "apache-tvm", "apache-tvm-ffi"}
    assert all(importlib.metadata.version(name) == version for name, version in about.versions.items())


def test_what_it_says_of_lse_and_empty_sequences_is_so(compiled):
    inputs = make_inputs(BASE, [0, 1])
    out, lse = compiled(BASE).decode(*inputs.arguments, scale=0.0, return_lse=True)
    assert not out[0].any()
    assert np.all(np.isneginf(lse[0]))
    _, lse = compiled(BASE).decode(*make_inputs(BASE, [7]).arguments, scale=0.0, return_lse=True)
    np.testing.assert_allclose(lse, np.log(7), rtol=1e-6)


def test_is_read_without_loading(library):
    about = manifest.read(library, "it")
    assert about.spec == BASE
    assert manifest.seal(body(library), about) == library
    assert manifest.checksum(library) == hashlib.sha256(library[:-44]).hexdigest()


def test_every_flipped_byte_is_noticed(library, refused):
    """Any bit of any byte: code, data, headers, the manifest and the checksum itself."""
    rng = np.random.default_rng(0)
    length = len(library)
    places = [*rng.integers(0, length, 200), *range(length - manifest._FOOTER.size, length), 0, 4, 18]
    for place in map(int, places):
        damaged = bytearray(library)
        damaged[place] ^= 1 << int(rng.integers(8))
        refused(bytes(damaged), "expected")


def test_cut_and_filled_files_are_noticed(library, refused):
    rng = np.random.default_rng(1)
    for kept in (0, 1, 43, 44, 55, 56, 57, len(library) - 1, *rng.integers(0, len(library), 20)):
        refused(library[: int(kept)], r"which ends with b'pa_compiler\\n', got")
    for start in map(int, rng.integers(0, len(library) - 4096, 10)):
        refused(library[:start] + bytes(4096) + library[start + 4096 :], "damaged")
    refused(library + b"\0", "got b?")
    refused(library[:4096] + library[8192:], "damaged")


def test_what_is_no_library_of_ours_is_named(library, refused):
    refused(b"not a library", r"got 13 bytes that end with b'ot a library'")
    refused(body(library), "expected a library written by Module.save")


def test_another_format_is_named(library, refused):
    with pytest.MonkeyPatch.context() as patch:
        about = manifest.read(library, "it")
        patch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
        newer = manifest.seal(body(library), about)
    refused(newer, rf"expected a library of format {manifest.FORMAT}, got format {manifest.FORMAT + 1}")


@pytest.mark.parametrize(("field", "value"), [("lse", "logarithm to base 2"), ("empty_rows", "NaN")])
def test_other_conventions_are_refused(library, refused, field, value):
    refused(sealed_again(library, **{field: value}), f"expected {field} to be .*, got '{value}'")


def test_another_machine_is_refused(library, refused):
    refused(
        sealed_again(library, machine="riscv64"), "expected a library for this machine, x86_64, got one for riscv64"
    )


@pytest.mark.scorecard(23)
def test_another_cpu_is_refused_with_the_features_it_lacks(compiled, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(cpu_features, "cpuinfo", lambda: {"flags": HASWELL})
    module = compiled(SPECS["float16"], target={"kind": "llvm", "mcpu": "sapphirerapids"})
    module.save(tmp_path / "pa.so")
    refused((tmp_path / "pa.so").read_bytes(), "lacks: amx-bf16 .*avx512bf16 .*avx512f avx512fp16 .*avx512vl .*gfni")
    shown = CliRunner().invoke(cli.main, ["show", str(tmp_path / "pa.so")])
    assert shown.exit_code == 0
    assert "no: expected a library for this CPU, got one that uses what it lacks" in " ".join(shown.stdout.split())
    compiled(BASE, target={"kind": "llvm", "mcpu": "x86-64-v3"}).save(tmp_path / "pa.so")
    assert pa_compiler.load(tmp_path / "pa.so").manifest.features == tuple(sorted(V3))
    monkeypatch.setattr(cpu_features, "cpuinfo", lambda: {"flags": HASWELL.replace(" avx2", "").replace(" abm", "")})
    refused((tmp_path / "pa.so").read_bytes(), "lacks: avx2 lzcnt$")
    monkeypatch.setattr(cpu_features, "cpuinfo", dict)
    refused((tmp_path / "pa.so").read_bytes(), f"lacks: {' '.join(sorted(V3))}$")


@pytest.mark.scorecard(13)
def test_calls_of_a_module_for_another_cpu_name_every_feature_it_lacks(tmp_path, figure):
    """One that was compiled here, and so never loaded from a file: decode and append_kv know as much as load does."""
    cpu, known = target.resolve(backends.normalize("llvm")), cpu_features.INSTRUCTION_SETS
    lacks = cpu_features.missing_features(name for name, flag in known.items() if isinstance(flag, str))  # x86-64's
    assert lacks  # no CPU has both AMD's old and Intel's new ones
    tiles = tiling.choose(BASE, cpu, "fused")
    other = dataclasses.replace(cpu, features=cpu.features | set(lacks))
    build_library(BASE, other, tiles, "fused", tmp_path)
    module, inputs = artifact.loaded(cache.contents(tmp_path), BASE), make_inputs(BASE, [3, 9])
    assert module.manifest.unfit().endswith(f"what it lacks: {' '.join(lacks)}")
    key = np.zeros((1, BASE.num_kv_heads, BASE.head_dim), BASE.dtype)
    for call in (
        lambda: module.decode(*inputs.arguments),
        lambda: module.append_kv(key, key, inputs.key_cache, inputs.value_cache, np.zeros(1, np.int64)),
    ):
        with pytest.raises(RuntimeError, match=rf"^target: .* features that this one lacks: {' '.join(lacks)}$"):
            call()
        figure("kinds", 1)


UNREADABLE = """
import resource, sys
import numpy as np, pa_compiler
module = pa_compiler.load(sys.argv[1])
caches, one = np.zeros((2, 1, 5, 2, 24), np.float32), np.ones(1, np.int32)
arguments = (np.zeros((1, 6, 24), np.float32), *caches, np.zeros((1, 1), np.int32), one)
module.num_threads = 1
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
try:
    module.decode(*arguments)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
print(module.decode(*arguments).shape)
"""


def test_a_call_that_cannot_read_what_the_cpu_has_says_so(library, tmp_path):
    """Here because no file can be opened; the next call looks again."""
    (tmp_path / "pa.so").write_bytes(library)
    command = [sys.executable, "-c", UNREADABLE, str(tmp_path / "pa.so")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said == ["target: expected to read in /proc/cpuinfo what this CPU has, and could not", "(1, 6, 24)"]


def test_linux_and_llvm_agree_on_this_cpu():
    """A name of Linux's that is wrong in the table would be missing here, or on the machine that has the feature."""
    host = {
        str(name): bool(has) for name, has in tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")().items()
    }
    names = cpu_features.INSTRUCTION_SETS.keys() & host.keys()
    assert names > set(V3) - {"sse"}
    assert sorted(name for name in names if not host[name]) == cpu_features.missing_features(names)


@pytest.mark.parametrize("mcpu", ["x86-64-v4", "znver5", "graniterapids", "sierraforest"])
def test_every_vector_extension_is_checked(mcpu):
    cpu = target.resolve({"kind": "llvm", "mcpu": mcpu})
    vectors = {name for name in cpu.features if name.startswith(("sse", "ssse", "avx", "amx", "fma", "f16c"))}
    assert vectors - {"avx512vp2intersect"} <= set(target.instruction_sets(cpu))


def test_a_file_that_was_replaced_is_loaded_anew(compiled, tmp_path):
    """The system's loader alone would give the library that it has by that name."""
    one, other = SPECS["float32"], SPECS["float32_MQA"]
    path = tmp_path / "pa.so"
    for spec in (one, other, one):
        compiled(spec).save(path)
        loaded, inputs = pa_compiler.load(path), make_inputs(spec, [0, 40])
        assert loaded.spec == spec
        assert_same_bits(loaded.decode(*inputs.arguments), compiled(spec).decode(*inputs.arguments))
    path.write_bytes(bytes(path.stat().st_size))  # in place: what is loaded does not live there
    assert_same_bits(loaded.decode(*inputs.arguments), compiled(one).decode(*inputs.arguments))


def test_one_library_in_a_process_however_often_it_is_loaded(compiled, tmp_path, monkeypatch):
    compiled(BASE).save(tmp_path / "one.so")
    compiled(BASE).save(tmp_path / "two.so")
    pa_compiler.load(tmp_path / "one.so")
    monkeypatch.setattr(loader, "_opened", lambda *_: pytest.fail("it was loaded again"))
    assert pa_compiler.load(tmp_path / "two.so").spec == BASE


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("query", lambda a: a[:, :5], "[batch, 6, 24], got [2, 5, 24]"),
        ("query", lambda a: a.astype(np.float16), "float32, got float16"),
        ("key_cache", lambda a: a[:, :4], "[num_blocks, 5, 2, 24]"),
        ("value_cache", lambda a: a[..., :16], "[num_blocks, 5, 2, 24]"),
        ("block_table", lambda a: a.view(np.uint32), "int32 or int64, got uint32"),
        ("context_lens", lambda a: a[:1], "[2], got [1]"),
    ],
    ids=["heads", "dtype", "block_size", "head_dim", "block_table", "batch"],
)
def test_decode_names_what_the_manifest_says(library, tmp_path, name, wrong, says):
    (tmp_path / "pa.so").write_bytes(library)
    inputs = make_inputs(BASE, [3, 9])
    inputs = inputs.replace(**{name: wrong(getattr(inputs, name))})
    with pytest.raises((TypeError, ValueError)) as caught:
        pa_compiler.load(tmp_path / "pa.so").decode(*inputs.arguments)
    assert str(caught.value).startswith(f"{name}: expected ")
    assert says in str(caught.value)


def test_show(compiled, tmp_path, library):
    path = tmp_path / "a library.so"
    path.write_bytes(library)
    shown = CliRunner().invoke(cli.main, ["show", str(path)])
    assert shown.exit_code == 0
    words = " ".join(shown.stdout.split())
    for expected in (
        "6 query heads on 2 kv heads of 24, float32 in, float32 out",
        "NHD, blocks of 5 tokens",
        "fused",
        "natural logarithm",
        "out 0, lse -inf",
        "x86_64",
        " ".join(compiled(BASE).manifest.features),
        f"apache-tvm {importlib.metadata.version('apache-tvm')}",
        compiled(BASE).manifest.kernels,
        manifest.checksum(library),
        "loads yes",
    ):
        assert expected in words
    path.write_bytes(library.replace(b"float32", b"float16"))
    shown = CliRunner().invoke(cli.main, shlex.split(f"show '{path}'"))
    assert shown.exit_code == 1
    assert "damaged" in shown.stderr
