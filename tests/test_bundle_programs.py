"""C and C++ programs on a bundle: what it exports and needs, calls between guard pages, and how it comes and goes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bundles
import numpy as np
import pytest
from bundles import SPECS, C, manifest, program, target_names
from c_calls import read_result, write_case
from inputs import make_inputs
from ragged_inputs import make_ragged
from tolerances import assert_same_bits

from pa_compiler import naming
from pa_compiler.runtime.cpu_features import missing_features

ROOT = Path(__file__).parents[1]
NAMES = ("query", "key_cache", "value_cache", "block_table", "context_lens", "query_start_loc")


def output(*words, **environment):
    env = os.environ | {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def driver(bundle, tmp_path_factory):
    """driver(static) -> the program of driver.c."""
    folder = tmp_path_factory.mktemp("driver")
    made = {static: program(bundle, C / "driver.c", folder / f"{static}", static=static) for static in (False, True)}
    return made.__getitem__


@pytest.mark.parametrize("words", ["gcc -std=c99 -x c", "g++ -std=c++11 -x c++", "g++ -std=c++20 -x c++"])
def test_the_header_says_nothing(bundle, tmp_path, words):
    source = tmp_path / "source"
    source.write_text(
        '#include "pa.h"\n#include "pa.h"\nint main(void) { return pa_api_version() != PA_API_VERSION; }\n'
    )
    flags = "-Wall -Wextra -Wpedantic -Werror -Wconversion -Wshadow -fsyntax-only".split()
    done = subprocess.run(
        [*words.split(), *flags, f"-I{bundle / 'include'}", str(source)], capture_output=True, check=True
    )
    assert done.stdout + done.stderr == b""


def test_what_is_exported_and_what_is_needed(bundle):
    lib = bundle / "lib"
    names = {
        line.split()[-1].partition("@")[0]
        for line in output("nm", "-D", "--defined-only", lib / "libpa.so").splitlines()
    }
    declared = set(re.findall(r"\b(pa_\w+)\(const|\b(pa_\w+)\(", (bundle / "include" / "pa.h").read_text()))
    assert {name for name in names if not name.startswith("libpa_")} == {a or b for a, b in declared}
    in_archive = output("nm", "-g", "--defined-only", lib / "libpa.a").splitlines()
    assert {line.split()[-1] for line in in_archive if " " in line} == {a or b for a, b in declared}
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", lib / "libpa.so"))
    assert {name.partition(".so")[0] for name in needed} <= {"libc", "libm", "libpthread", "libdl", "ld-linux-x86-64"}


def test_symbols_explain(bundle):
    symbols = {line.split()[-1] for line in output("nm", bundle / "lib" / "libpa.so").splitlines()}
    for spec in manifest(bundle)["specs"]:
        for variant in spec["variants"]:
            assert set(variant["kernels"]) <= symbols
            for kernel in variant["kernels"]:
                of_spec, tiles, target, _ = kernel.removeprefix("pa_").split("__")
                assert of_spec == spec["name"]
                assert tiles.rpartition("_r")[0] in variant["strategies"].values()
                assert target == re.sub(r"\W", "_", variant["target"])


def test_the_texts_of_the_stages(bundle):
    for spec in SPECS.values():
        for target in target_names(bundle):
            folder = bundle / "stages" / naming.spec_name(spec) / target
            assert {path.name for path in folder.iterdir()} == {
                *("tensorir.py", "scheduled.py", "host.cc", "kernels.ll", "kernels.s"),
            }
    assert (bundle / "manifest.json").read_text().rstrip() == bundles.Library(bundle).c.pa_manifest().decode().rstrip()


def cases(spec):
    """(file, arrays that are written) of some calls, and what the module is to be called with."""
    lens = [0, 1, spec.block_size, 130, 2600]
    inputs = make_inputs(spec, lens, spare_blocks=0, surplus=0)
    ragged = make_ragged(spec, [(3, 9), (1, 300), (17, 129), (2, 9000)], spare_blocks=0, surplus=0)
    out = np.full((*ragged.query.shape[:2], spec.result_dim), np.nan, inputs.out_dtype)
    lse = np.full(ragged.query.shape[:2], np.nan, np.float32)
    yield (
        "decode",
        dict(zip(NAMES, inputs.arguments, strict=False)) | {"out": inputs.out, "lse": inputs.lse} | inputs.heads,
    )
    yield "attend", dict(zip(NAMES, ragged.arguments, strict=True)) | {"out": out, "lse": lse} | ragged.inputs.heads


@pytest.mark.parametrize("static", [False, True], ids=["shared", "static"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16_packed", "scored"])
def test_calls_between_guard_pages(bundle, compiled, driver, tmp_path, name, static):
    """In memory of each kind, at both ends of the arrays: the bits of the module."""
    spec, module = SPECS[name], compiled(SPECS[name], attend=True)
    words, expected = [], []
    for call, arrays in cases(spec):
        for manner in ("default", "workspace", "caller"):
            file, result = tmp_path / f"{call}.{manner}", tmp_path / f"{call}.{manner}.result"
            write_case(file, call, naming.spec_name(spec), arrays, manner=manner)
            words += [file, result]
            expected.append((call, arrays, result))
    for option in ([], ["--begin"]):
        output(driver(static), *option, *words, PA_ISA=target_names(bundle)[1])
        for call, arrays, result in expected:
            status, message, found = read_result(result, [arrays["out"], arrays["lse"]])
            assert (status, message) == (0, "")
            made = {each: np.copy(arrays[each]) for each in ("out", "lse")}
            getattr(module, call)(**arrays | made)
            for one, other in zip(found, made.values(), strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("option", [[], ["--begin"]], ids=["end", "begin"])
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "block_table", "context_lens", "out", "lse"])
def test_an_element_outside_ends_the_driver(driver, tmp_path, option, name):
    """Without this, calls between guard pages would say nothing."""
    spec = SPECS["float32"]
    inputs = make_inputs(spec, [2 * spec.block_size] * 3, spare_blocks=0, surplus=0)
    arrays = dict(zip(NAMES, inputs.arguments, strict=False)) | {"out": inputs.out, "lse": inputs.lse}
    write_case(tmp_path / "case", "decode", naming.spec_name(spec), arrays, beside=name)
    done = subprocess.run([driver(False), *option, tmp_path / "case", tmp_path / "result"], check=False)
    assert done.returncode == -signal.SIGSEGV


def test_append_kv_between_guard_pages(bundle, compiled, driver, tmp_path):
    spec, module = SPECS["float16"], compiled(SPECS["float16"], attend=True)
    rng = np.random.default_rng(0)
    arrays = {each: rng.random((40, 2, 24), np.float32).astype(np.float16) for each in ("key", "value")}
    arrays |= {each: np.zeros((6, 8, 2, 24), np.float16) for each in ("key_cache", "value_cache")}
    arrays["slot_mapping"] = rng.permutation(48)[:40]
    for manner in ("default", "workspace", "caller"):
        write_case(tmp_path / "case", "append_kv", naming.spec_name(spec), arrays, manner=manner)
        output(driver(False), tmp_path / "case", tmp_path / "result")
        status, message, found = read_result(tmp_path / "result", [arrays["key_cache"], arrays["value_cache"]])
        assert (status, message) == (0, "")
        made = {each: np.copy(arrays[each]) for each in ("key_cache", "value_cache")}
        module.append_kv(**arrays | made)
        for one, other in zip(found, made.values(), strict=True):
            assert_same_bits(one, other)


def test_the_first_target_that_fits_is_chosen(bundle, other_bundle, driver):
    for folder in (bundle, other_bundle):
        targets = [each for each in manifest(folder)["targets"] if not each["tile_registers"]]
        fit = [each["name"] for each in targets if not missing_features(each["features"])]
        assert bundles.Library(folder).isa.decode() in (fit[0], manifest(folder)["targets"][0]["name"])
    for name in target_names(bundle):
        assert output(driver(True), PA_ISA=name) == f"{name}\n"


def test_a_target_that_does_not_fit_is_named(bundle, other_bundle, tmp_path):
    lacks = missing_features(
        next(t for t in manifest(other_bundle)["targets"] if t["name"] == "sapphirerapids")["features"]
    )
    source = tmp_path / "find.c"
    source.write_text(
        '#include <stdio.h>\n#include "pa.h"\nint main(void) {\n  const pa_kernels *k;\n  pa_error e;\n'
        '  printf("%d ", pa_find(pa_name(0), &k, &e));\n  puts(e.message);\n  return pa_isa() != NULL;\n}\n'
    )
    said = output(program(bundle, source, tmp_path / "find"), PA_ISA="i386")
    assert said.startswith("2 PA_ISA: expected a target of this bundle, one of")
    assert said.endswith(", got i386\n")
    if lacks:
        said = output(program(other_bundle, source, tmp_path / "other"), PA_ISA="sapphirerapids")
        assert said.startswith(
            "4 target: this bundle is built for CPUs with features that this one lacks: for sapphirerapids lacks "
            + " ".join(lacks)[:100]
        )


def test_two_bundles_in_one_process_do_not_meet(bundle, other_bundle, compiled, tmp_path):
    """Both in the global scope: what each calls inside is its own."""
    script = tmp_path / "both.py"
    script.write_text(
        "import ctypes, json, sys\n"
        "one, other = (ctypes.CDLL(f'{path}/lib/libpa.so', mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:])\n"
        "for each in (one, other):\n"
        "    each.pa_manifest.restype = each.pa_name.restype = each.pa_isa.restype = ctypes.c_char_p\n"
        "    each.pa_count.restype = ctypes.c_int64\n"
        "    print(each.pa_count(), len(json.loads(each.pa_manifest())['targets']), each.pa_isa().decode())\n"
        "    k, e = ctypes.c_void_p(), ctypes.create_string_buffer(512)\n"
        "    assert each.pa_find(each.pa_name(ctypes.c_int64(0)), ctypes.byref(k), e) == 0\n"
        "    each.pa_kernels_name.restype = ctypes.c_char_p\n"
        "    print(each.pa_kernels_name(k).decode().split('__')[2])\n"
    )
    lines = output(sys.executable, script, bundle, other_bundle).splitlines()
    (own, targets, isa), of_own, (others, other_targets, other_isa), of_other = (
        line.split() if number % 2 == 0 else line for number, line in enumerate(lines)
    )
    assert (int(own), int(others)) == (len(SPECS), 1)
    assert (int(targets), int(other_targets)) == (2, 2)
    assert [of_own, of_other] == [re.sub(r"\W", "_", name) for name in (isa, other_isa)]
    assert isa != other_isa


def test_a_thousand_times_loaded_and_unloaded(bundle, tmp_path):
    made = program(bundle, C / "reload.c", tmp_path / "reload", "-ldl")
    spec = naming.spec_name(SPECS["float32"])
    heap, mappings, threads = map(int, output(made, bundle / "lib" / "libpa.so", spec, 1000).split())
    assert threads == 0
    assert mappings <= 16
    assert heap <= 64 * 1000  # it rises and falls with what ends of threads leave: less than a leak of 64 bytes a time


def examples(bundle_folder, folder):
    """The programs of examples/bundle, built by CMake."""
    build = ["cmake", "-S", ROOT / "examples" / "bundle", "-B", folder, f"-DCMAKE_PREFIX_PATH={bundle_folder}"]
    output(*build, "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    output("cmake", "--build", folder)
    return folder / "decode", folder / "prefill"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="examples are built by CMake, which is not installed")
def test_the_examples_print_what_numpy_gets(tmp_path):
    sys.path.insert(0, str(ROOT / "examples" / "bundle"))
    try:
        import make_cache
    finally:
        sys.path.pop(0)
    made = tmp_path / "bundle"
    words = ["bundle", "-o", made, "--spec", make_cache.OPTIONS + " --out-dtype float32", "--targets", "x86-64-v3"]
    said = output(Path(sys.executable).with_name("pa-compiler"), *words)
    assert said.splitlines()[-1] == make_cache.SPEC
    output(sys.executable, ROOT / "examples" / "bundle" / "make_cache.py", tmp_path / "cache")
    expected = make_cache.attention(make_cache.arrays())
    decode, prefill = examples(made, tmp_path / "build")
    for path, rows in ((decode, 3), (prefill, 1)):
        lines = output(path, tmp_path / "cache").splitlines()
        found = [[float(number) for number in line.partition(":")[2].split()] for line in lines]
        np.testing.assert_allclose(found, expected[:rows, 0, :4], atol=2e-5)
    assert json.loads((made / "manifest.json").read_text())["specs"][0]["name"] == make_cache.SPEC
    if shutil.which("pkg-config"):
        flags = output(
            "pkg-config", "--cflags", "--libs", "pa", PKG_CONFIG_PATH=str(made / "lib" / "pkgconfig")
        ).split()
        output("gcc", "-std=c99", ROOT / "examples" / "bundle" / "decode.c", *flags, "-o", tmp_path / "decode")
        output(tmp_path / "decode", tmp_path / "cache", LD_LIBRARY_PATH=str(made / "lib"))
