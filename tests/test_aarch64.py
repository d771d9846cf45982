"""Code for aarch64: bundles that run under qemu, and what is said of libraries that do not run."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import aarch64
import numpy as np
import pytest
import tvm_ffi.libinfo
from attend_calls import assert_close, make_call
from c_calls import KINDS
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec, backends, host, native
from pa_compiler.bundles.bundle import bundle
from pa_compiler.cpu import target
from pa_compiler.naming import spec_name
from pa_compiler.runtime import cpu_features

N1, V2 = ({"kind": "llvm", "mcpu": f"neoverse-{name}"} for name in ("n1", "v2"))
HERE = Path(__file__).parent
PLAIN = {  # for a CPU without bfloat16
    "float32": PagedAttentionSpec(6, 2, 24, 5, "float32"),
    "float32_MQA": PagedAttentionSpec(16, 1, 16, 16, "float32", window=37),
    "float16_HND": PagedAttentionSpec(16, 1, 32, 8, "float16", kv_layout="HND"),
    "float32_packed": PagedAttentionSpec(4, 1, 16, 16, "float32", kv_layout="packed"),
}
BFLOAT16 = {  # for one with and one without
    "bfloat16": PagedAttentionSpec(16, 1, 32, 16, "bfloat16", window=100),
    "bfloat16_HND": PagedAttentionSpec(8, 2, 32, 8, "bfloat16", kv_layout="HND"),
    "bfloat16_packed": PagedAttentionSpec(10, 2, 32, 16, "bfloat16", kv_layout="packed"),
    "bfloat16_odd": PagedAttentionSpec(6, 2, 24, 5, "bfloat16", value_dim=40, softcap=3.0, alibi=True, sinks=True),
    "bfloat16_int8": PagedAttentionSpec(16, 1, 32, 16, "bfloat16", kv_dtype="int8"),
}
CASES = [(name, "neoverse-n1") for name in [*PLAIN, *BFLOAT16]] + [(name, "neoverse-v2") for name in BFLOAT16]
LENGTHS = [0, 1, 7, 15, 16, 17, 32, 37, 38, 130]
ATTENDED = [(1, 9), (5, 5), (16, 48), (0, 3), (17, 150), (3, 16)]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """The bundle that a spec is in, by the spec's name; each is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("aarch64")

    @functools.cache
    def plain():
        bundle(PLAIN.values(), [N1], folder / "plain")
        return folder / "plain"

    @functools.cache
    def of_bfloat16():
        bundle(BFLOAT16.values(), ["neoverse-n1", "neoverse-v2"], folder / "bfloat16")
        return folder / "bfloat16"

    return lambda name: plain() if name in PLAIN else of_bfloat16()


@pytest.fixture
def driver(bundles, request, tmp_path):
    return aarch64.Driver(bundles(request.param), HERE / "c" / "driver.c", tmp_path)


def decode_arrays(inputs):
    names = ("query", "key_cache", "value_cache", "block_table", "context_lens")
    return dict(zip(names, inputs.arguments, strict=True)) | {"out": inputs.out, "lse": inputs.lse, **inputs.heads}


def attend_arrays(spec, call):
    out = np.full((*call.query.shape[:2], spec.result_dim), np.nan, call.query.dtype)
    return {
        **{name: getattr(call, name) for name in ("query", "key_cache", "value_cache", "block_table", "context_lens")},
        **{name: getattr(call, name) for name in ("alibi_slopes", "sinks") if getattr(spec, name.split("_")[0])},
        "query_start_loc": call.starts, "out": out, "lse": np.full(call.query.shape[:2], np.nan, np.float32),
    }  # fmt: skip


@aarch64.needs_tools
@pytest.mark.parametrize(("driver", "name", "isa"), [(name, name, isa) for name, isa in CASES], indirect=["driver"])
def test_calls_under_emulation(driver, name, isa):
    """Decode and attend against NumPy's, with poison in what must not be read, and arrays that end at guarded pages."""
    spec = (PLAIN | BFLOAT16)[name]
    decodes = [make_inputs(spec, LENGTHS, poison=poison) for poison in POISONS]
    attends = [] if spec.kv_dtype else [make_call(spec, ATTENDED, poison=poison) for poison in POISONS]
    for inputs in decodes:
        driver.add("decode", spec_name(spec), decode_arrays(inputs))
    for call in attends:
        driver.add("attend", spec_name(spec), attend_arrays(spec, call), scale=call.scale)
    driver.add("decode", spec_name(spec), decode_arrays(decodes[0]), threads=1, manner="workspace")
    for call in attends[:1]:
        driver.add("attend", spec_name(spec), attend_arrays(spec, call), scale=call.scale, threads=1)
    results = driver.results(isa=isa)
    assert [(status, message) for status, message, _ in results] == [(0, "")] * len(results)
    arrays = [written for *_, written in results]
    for inputs, (out, lse) in zip(decodes, arrays, strict=False):
        assert_close_to_oracle(spec, inputs, out, lse)
    for call, (out, lse) in zip(attends, arrays[len(decodes) :], strict=False):
        assert_close(spec, call, out, lse)
    again = len(decodes) + len(attends)  # one thread, and another's workspace
    of_attend = [*range(len(decodes), again), again + 1] if attends else []
    for same in ([*range(len(decodes)), again], of_attend):
        for other in same[1:]:
            for actual, expected in zip(arrays[other], arrays[same[0]], strict=True):
                assert_same_bits(actual, expected)


@aarch64.needs_tools
def test_a_feature_that_is_asked_for_is_there(tmp_path):
    """SVE, which kernels do without by themselves: the assembler takes it, and the library asks for it."""
    spec = PLAIN["float32"]
    bundle([spec], [N1 | {"mattr": ["+sve"]}], tmp_path / "sve")
    assert re.search(r"\bz\d+\.s\b", next((tmp_path / "sve" / "stages").rglob("*.s")).read_text())
    driver = aarch64.Driver(tmp_path / "sve", HERE / "c" / "driver.c", tmp_path)
    inputs, call = make_inputs(spec, LENGTHS), make_call(spec, ATTENDED)
    driver.add("decode", spec_name(spec), decode_arrays(inputs))
    driver.add("attend", spec_name(spec), attend_arrays(spec, call), scale=call.scale)
    (*_, decoded), (*_, attended) = driver.results()
    assert_close_to_oracle(spec, inputs, *decoded)
    assert_close(spec, call, *attended)
    status, message, _ = driver.results(cpu="neoverse-n1")[0]
    assert status == 4
    assert re.search(r"lacks .*\bsve\b", message)


@aarch64.needs_tools
@pytest.mark.parametrize("driver", ["bfloat16_packed"], indirect=True)
def test_products_of_blocks_have_the_bits_of_dot_products(driver):
    """bfmmla adds up a pair after the other as bfdot does: attend's last query tokens have decode's bits."""
    spec, lens = BFLOAT16["bfloat16_packed"], [(5, 5), (16, 48), (17, 150), (3, 16), (40, 300)]
    call = make_call(spec, lens, poison="inf")
    arrays = attend_arrays(spec, call)
    last = {name: np.ascontiguousarray(arrays[name][call.starts[1:] - 1]) for name in ("query", "out", "lse")}
    driver.add("attend", spec_name(spec), arrays, scale=call.scale)
    driver.add("decode", spec_name(spec), {**arrays, **last, "query_start_loc": None}, scale=call.scale)
    (*_, attended), (*_, decoded) = driver.results(isa="neoverse-v2")
    for of_attend, of_decode in zip(attended, decoded, strict=True):
        assert_same_bits(of_attend[call.starts[1:] - 1], of_decode)


def spoiled(inputs):
    """Arguments of decode by name, each in place of what was right."""
    table, lengths = inputs.block_table.copy(), inputs.context_lens.copy()
    table[1, 0], lengths[0] = 99, -1
    return [
        {"query": inputs.query.astype(np.float16)},
        {"query": inputs.query[:, :5]},
        {"key_cache": inputs.key_cache.view(np.int32)},
        {"value_cache": inputs.value_cache[:-1]},
        {"block_table": inputs.block_table.astype(np.float32)},
        {"block_table": inputs.block_table[:, :1]},
        {"block_table": table},
        {"context_lens": lengths},
        {"context_lens": inputs.context_lens[:-1]},
        {"out": inputs.out[..., :23]},
        {"lse": inputs.lse.astype(np.float64)},
        {"scale": float("nan")},
        {"out": inputs.query},
    ]


@aarch64.needs_tools
@pytest.mark.parametrize("driver", ["float32"], indirect=True)
def test_bad_arguments_have_the_words_of_the_module(driver, compiled):
    """The errors of this machine's module, of the same kind, from a library for another architecture."""
    spec = PLAIN["float32"]
    module, inputs = compiled(spec), make_inputs(spec, [7, 23, 5])
    expected = []
    for change in spoiled(inputs):
        call = decode_arrays(inputs) | {
            name: value if np.isscalar(value) else np.ascontiguousarray(value) for name, value in change.items()
        }
        with pytest.raises((TypeError, ValueError, IndexError)) as caught:
            module.decode(**call)
        expected.append((type(caught.value), str(caught.value)))
        over = ("out", "query") if call["out"] is inputs.query else None
        driver.add("decode", spec_name(spec), call, scale=call.pop("scale", None), over=over)
    found = [(KINDS.get(status), message) for status, message, _ in driver.results()]
    assert found == expected


@aarch64.needs_tools
@pytest.mark.parametrize("driver", ["bfloat16"], indirect=True)
def test_arrays_that_begin_at_guarded_pages_and_which_target_is_chosen(driver, bundles):
    spec = BFLOAT16["bfloat16"]
    inputs = make_inputs(spec, LENGTHS)
    driver.add("decode", spec_name(spec), decode_arrays(inputs))
    found = []
    for how in ({"cpu": "max"}, {"cpu": "neoverse-n1"}, {"isa": "neoverse-n1"}, {"cpu": "cortex-a53"}):
        found += driver.results("--begin", **how)
        found[-1] = (driver.isa, *found[-1])
    assert [isa for isa, *_ in found[:3]] == ["neoverse-v2", "neoverse-n1", "neoverse-n1"]
    for _, status, message, (out, lse) in found[:3]:
        assert (status, message) == (0, "")
        assert_close_to_oracle(spec, inputs, out, lse)
    assert_same_bits(found[1][3][0], found[2][3][0])
    assert found[0][3][0].tobytes() != found[1][3][0].tobytes()  # of bfdot, and of float32's multiply-add
    _, status, message, _ = found[3]
    assert status == 4
    assert re.search(r"features that this one lacks: for neoverse-v2 lacks .*\bbf16\b.*neoverse-n1 lacks", message)
    dynamic = subprocess.check_output(["readelf", "-d", bundles("bfloat16") / "lib/libpa.so"], text=True)
    assert set(re.findall(r"NEEDED.*\[(.*)\]", dynamic)) <= {"libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1"}


@aarch64.needs_tools
def test_the_headers_of_the_host(tmp_path):
    """The floating-point state by FPCR, features by the auxiliary vector, and the rest of templates/cpu."""
    of_templates = re.findall(r'#include "(?:cpu|shared)/.*\n', (HERE / "headers/cpu.cc").read_text())
    native.write_headers(host.headers("".join(of_templates)), tmp_path)
    includes = [f"-I{tmp_path}", f"-I{HERE / 'headers'}", f"-isystem{tvm_ffi.libinfo.find_include_path()}"]
    includes.append(f"-isystem{tvm_ffi.libinfo.find_dlpack_include_path()}")
    command = [aarch64.CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-subobject-linkage", "-pthread"]
    command += [*includes, HERE / "headers/cpu.cc", "-o", tmp_path / "program"]
    command.append("-Wl,--unresolved-symbols=ignore-all")  # tvm-ffi's, which no test calls
    subprocess.run(command, check=True)
    done = aarch64.run(tmp_path / "program")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@aarch64.needs_tools
def test_bits_of_the_auxiliary_vector():
    """As Linux's header has them, of those that it has."""
    text = Path(aarch64.SYSTEM, "include/asm/hwcap.h").read_text()
    bits = {name: int(bit) for name, bit in re.findall(r"#define HWCAP(\w+)\s+\(1\w* << (\d+)\)", text)}
    for name, word in (
        ("fp-armv8", "_FP"), ("neon", "_ASIMD"), ("fullfp16", "_ASIMDHP"), ("rdm", "_ASIMDRDM"), ("jsconv", "_JSCVT"),
        ("complxnum", "_FCMA"), ("dotprod", "_ASIMDDP"), ("sve", "_SVE"), ("fp16fml", "_ASIMDFHM"), ("flagm", "_FLAGM"),
        ("sve2", "2_SVE2"), ("altnzcv", "2_FLAGM2"), ("fptoint", "2_FRINT"), ("i8mm", "2_I8MM"), ("bf16", "2_BF16"),
        ("sme", "2_SME"),
    ):  # fmt: skip
        assert cpu_features.INSTRUCTION_SETS[name] == bits[word] + 64 * word.startswith("2")


@aarch64.needs_tools
def test_a_library_for_another_architecture(tmp_path):
    """It is built, saved, described and copied, and says why it does not run."""
    module = pa_compiler.compile(PLAIN["float32"], N1, attend=False, cache=False)
    assert (module.manifest.machine, module.target["mtriple"]) == ("aarch64", "aarch64-linux-gnu")
    assert set(module.manifest.features) == {"neon", "fp-armv8", "fullfp16", "dotprod", "rdm"}
    module.save(tmp_path / "pa.so")
    module.num_threads = 1
    module.report(tmp_path / "page.html")
    assert "fused multiply-adds</title>" in (tmp_path / "page.html").read_text()
    why = "expected a library for this machine, .*, got one for aarch64"
    inputs = make_inputs(module.spec, [3])
    with pytest.raises(RuntimeError, match=why):
        module.decode(*inputs.arguments)
    with pytest.raises(RuntimeError, match=why):
        module.plan(inputs.context_lens)
    with pytest.raises(RuntimeError, match=why):
        pa_compiler.load(tmp_path / "pa.so")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX_aarch64", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"'no-such-compiler' is not on PATH; .*g\+\+-aarch64-linux-gnu\), .*CXX_aa"):
        pa_compiler.compile(PLAIN["float32"], N1, cache=False)


def test_targets():
    assert backends.normalize(backends.named("neoverse-v2")) == V2 | {"mtriple": "aarch64-linux-gnu"}
    cpus = {
        name: target.resolve(backends.normalize(backends.named(f"neoverse-{name}")))
        for name in ("n1", "v1", "n2", "v2")
    }
    assert {name for name, cpu in cpus.items() if cpu.dot_pairs} == {"v1", "n2", "v2"}
    assert all((cpu.vector_lanes, cpu.vector_registers, cpu.machine) == (4, 32, "aarch64") for cpu in cpus.values())
    assert not {name for cpu in cpus.values() for name in target.instruction_sets(cpu) if name.startswith("s")}
    for given, said in (
        ({"mtriple": "riscv64-linux-gnu"}, "target: expected mtriple 'x86_64-linux-gnu' or 'aarch64-linux-gnu'"),
        ({"mtriple": "aarch64-apple-darwin"}, "target: expected mtriple"),
        ({"mtriple": 1}, "target: expected mtriple to be a string, got 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            backends.normalize({"kind": "llvm", **given})
    with pytest.raises(ValueError, match="an mcpu that LLVM knows, such as neoverse-n1, got 'x86-64-v3'"):
        target.resolve(backends.normalize({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "x86-64-v3"}))
