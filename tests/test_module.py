"""Module: the texts it carries, saving and loading without TVM, threads, targets, and the plan."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm.script
from inputs import make_inputs
from specs import BASE, SPECS, every_pipeline
from tolerances import assert_close_to_oracle, assert_same_bits

import pa_compiler
from pa_compiler import host

STAGES = ["tensorir", "scheduled", "host", "llvm", "asm"]
LENGTHS = [0, 1, 37, 2500, 5]
SMALL = pa_compiler.PagedAttentionSpec(3, 1, 4, 2, "float32")

WITHOUT_TVM = """
import sys
import numpy as np
import pa_compiler
module = pa_compiler.load(sys.argv[1])
arrays = np.load(sys.argv[2])
np.save(sys.argv[3], module.decode(**arrays))
tvm = sorted(name for name in sys.modules if name == "tvm" or name.startswith("tvm."))
assert not tvm, tvm
"""


@every_pipeline
def test_sources(compiled, pipeline):
    module = compiled(BASE, pipeline)
    assert list(module.sources) == STAGES
    kernels = {
        "fused": ["fused_decode", "merge_partials"],
        "staged": ["qk_matmul", "softmax_prepare", "pv_matmul", "online_update", "normalize"],
    }
    for stage, text in module.sources.items():
        for name in kernels[pipeline]:
            assert name in text, f"{stage} has no {name}"
    with pytest.raises(TypeError):
        module.sources["host"] = ""


def test_the_same_every_time(compiled):
    """No time, path or order of a set gets into what is run. TVM numbers the symbols in TensorIR's text as it likes."""
    again, expected = pa_compiler.compiler.emit(BASE, attend=False), compiled(BASE).sources
    assert list(again) == STAGES
    for stage in ("host", "asm"):
        assert again[stage] == expected[stage], stage
    for stage in ("tensorir", "scheduled"):
        one, other = (tvm.script.from_source(text) for text in (again[stage], expected[stage]))
        tvm.ir.assert_structural_equal(one, other)


def test_dump(compiled, tmp_path):
    module = pa_compiler.compile(BASE, dump_dir=tmp_path / "dump")
    *dumped, include = sorted((tmp_path / "dump").iterdir())
    assert [path.name[:2] for path in dumped] == ["1_", "2_", "3_", "4_", "5_"]
    assert [path.read_text() for path in dumped] == list(module.sources.values())
    headers = {path.relative_to(include).as_posix(): path.read_text() for path in include.rglob("*.h")}
    assert headers == host.headers(module.sources["host"])


@every_pipeline
def test_what_a_module_knows_of_itself(compiled, tmp_path, pipeline):
    module = compiled(BASE, pipeline)
    module.save(tmp_path / "pa.so")
    loaded = pa_compiler.load(str(tmp_path / "pa.so"))
    for one in (module, loaded):
        assert one.spec == BASE
        assert one.pipeline == pipeline
        assert one.target["kind"] == "llvm"
        assert one.target["mcpu"]
    assert loaded.target == module.target
    assert not loaded.sources
    assert [path.name for path in tmp_path.iterdir()] == ["pa.so"]


def test_out_dtype_of_a_modules_spec_follows_dtype_unless_it_was_given(own_cache, tmp_path):
    """Whichever of the two filled the cache. A library states its types."""
    given = dataclasses.replace(SMALL, out_dtype=SMALL.dtype)
    for spec, follows in ((SMALL, True), (given, False), (SMALL, True)):
        module = pa_compiler.compile(spec)
        out_dtype = "float16" if follows else SMALL.dtype
        assert dataclasses.replace(module.spec, dtype="float16").result_dtype == out_dtype
    assert len([path for path in own_cache.iterdir() if path.is_dir()]) == 1
    module.save(tmp_path / "pa.so")
    assert pa_compiler.load(tmp_path / "pa.so").spec.result_dtype == SMALL.dtype


@every_pipeline
def test_load_and_decode_without_tvm(compiled, tmp_path, pipeline):
    module, inputs = compiled(BASE, pipeline), make_inputs(BASE, LENGTHS)
    module.save(tmp_path / "pa.so")
    names = ("query", "key_cache", "value_cache", "block_table", "context_lens")
    np.savez(tmp_path / "inputs.npz", **dict(zip(names, inputs.arguments, strict=True)))
    paths = [str(tmp_path / name) for name in ("pa.so", "inputs.npz", "out.npy")]
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TVM, *paths], check=True, cwd=tmp_path)
    assert_same_bits(np.load(paths[-1]), module.decode(*inputs.arguments))


@pytest.mark.scorecard(13)
def test_load_refuses_what_it_did_not_save(figure, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.so"):
        pa_compiler.load(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(RuntimeError, match=r"text\.so"):
        pa_compiler.load(tmp_path / "text.so")
    figure("kinds", 2)


def test_save_replaces_and_leaves_nothing_behind(compiled, tmp_path):
    path = tmp_path / "pa.so"
    path.write_text("old")
    compiled(BASE).save(path)
    assert pa_compiler.load(path).spec == BASE
    with pytest.raises(OSError, match="missing"):
        compiled(BASE).save(tmp_path / "missing" / "pa.so")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**63, ValueError),
        (2**64, ValueError),
        (np.uint64(2**63), ValueError),
        (1.0, TypeError),
        ("2", TypeError),
        (True, TypeError),
        (np.True_, TypeError),
        (np.array(2), TypeError),
    ],
    ids=repr,
)
def test_num_threads_is_checked(figure, compiled, value, error):
    module = compiled(BASE)
    shown = re.escape("an array of shape []" if isinstance(value, np.ndarray) else str(value))
    with pytest.raises(error, match=rf"^num_threads: expected .*got .*{shown}"):
        module.num_threads = value
    assert module.num_threads == 2
    figure("kinds", 1)


def test_num_threads_of_any_size(compiled):
    module, inputs = compiled(BASE), make_inputs(BASE, LENGTHS)
    expected = module.decode(*inputs.arguments)
    for value in (np.int32(3), np.uint8(1), 2**63 - 1):
        module.num_threads = value
        assert type(module.num_threads) is int
        assert_same_bits(module.decode(*inputs.arguments), expected)
    module.num_threads = 2


def test_num_threads_from_the_environment(compiled, tmp_path, monkeypatch):
    compiled(BASE).save(tmp_path / "pa.so")
    assert pa_compiler.load(tmp_path / "pa.so").num_threads == len(os.sched_getaffinity(0))
    monkeypatch.setenv("PA_NUM_THREADS", "5")
    assert pa_compiler.load(tmp_path / "pa.so").num_threads == 5
    for bad in ("0", "-1", "two", "", "1.5", "²", "9" * 19, "1" + "0" * 5000):
        monkeypatch.setenv("PA_NUM_THREADS", bad)
        with pytest.raises(ValueError, match=rf"PA_NUM_THREADS.*{bad!r}"):
            pa_compiler.load(tmp_path / "pa.so")


@pytest.mark.parametrize(
    ("mcpu", "name", "pipeline"),
    [
        ("x86-64", "float32", "fused"),
        ("x86-64", "float16", "staged"),
        ("x86-64", "bfloat16_HND", "fused"),
        ("x86-64-v3", "float32", "staged"),
        ("x86-64-v3", "bfloat16_HND", "fused"),
    ],
)
def test_older_targets(compiled, mcpu, name, pipeline):
    spec = SPECS[name]
    module, inputs = compiled(spec, pipeline, {"kind": "llvm", "mcpu": mcpu}), make_inputs(spec, LENGTHS)
    assert module.target == {"kind": "llvm", "mcpu": mcpu}
    assert "zmm" not in module.sources["asm"]
    assert ("ymm" in module.sources["asm"]) == (mcpu == "x86-64-v3")
    out, lse = module.decode(*inputs.arguments, return_lse=True)
    assert_close_to_oracle(spec, inputs, out, lse)


def has_avx512():
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    return {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags)


@every_pipeline
@pytest.mark.skipif(not has_avx512(), reason="this CPU has no AVX-512: code for x86-64-v4 is compiled and not run")
def test_avx512(compiled, pipeline):
    spec = SPECS["float16"]
    module, inputs = compiled(spec, pipeline, {"kind": "llvm", "mcpu": "x86-64-v4"}), make_inputs(spec, LENGTHS)
    out, lse = module.decode(*inputs.arguments, return_lse=True)
    assert_close_to_oracle(spec, inputs, out, lse)


@every_pipeline
def test_avx512_is_compiled_anywhere_and_refused_where_it_is_missing(compiled, pipeline):
    spec = SPECS["float16"]
    module, inputs = compiled(spec, pipeline, {"kind": "llvm", "mcpu": "x86-64-v4"}), make_inputs(spec, LENGTHS)
    assert "zmm" in module.sources["asm"]
    if not has_avx512():
        out = inputs.out
        with pytest.raises(RuntimeError, match=r"avx512f.*avx512"):
            module.decode(*inputs.arguments, out=out)
        assert_same_bits(out, inputs.out)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no-such-compiler.*g\+\+.*apt-get install g\+\+"):
        pa_compiler.compile(BASE, cache=False)


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho 'no room on device' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"(?s)broken-g\+\+.*3.*no room on device"):
        pa_compiler.compile(BASE, cache=False)
