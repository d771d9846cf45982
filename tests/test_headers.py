"""The hosts' headers by themselves, each room with a program of tests; and what the C++ compiler refuses for us."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import jinja2
import pytest
import tvm_ffi.libinfo
from specs import BASE, SPECS

from pa_compiler import PagedAttentionSpec, host, installation, native
from pa_compiler.cpu import backend, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cuda import backend as cuda_backend
from pa_compiler.cuda import host as cuda_host
from pa_compiler.cuda import tiling as cuda_tiling
from pa_compiler.cuda.kernels import launches
from pa_compiler.cuda.target import CudaTarget

CPU = target.CpuTarget('{"kind": "llvm"}', frozenset({"avx", "avx2", "fma"}))
ON_CUDA, GPU = PagedAttentionSpec(8, 2, 64, 16, "bfloat16"), CudaTarget("sm_90")
PROGRAMS = {path.stem: path for path in Path(__file__).parent.glob("headers/*.cc")}
HEADERS = sorted(place.removesuffix(".j2") for place in installation.templates() if place.endswith((".h", ".h.j2")))
GXX = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-subobject-linkage"]


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """A folder with all headers."""
    folder = tmp_path_factory.mktemp("include")
    native.write_headers(host.headers("".join(f'#include "{place}"\n' for place in HEADERS)), folder)
    return folder


def gxx(*arguments, include):
    """g++'s words about C++ that includes the headers; "" where it takes it."""
    paths = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    command = [*GXX, f"-I{include}", *(f"-isystem{path}" for path in paths), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bool(done.returncode) == ("error:" in done.stderr), done.stderr
    return done.stderr


def test_there_are_headers():
    rooms = {place.partition("/")[0] for place in HEADERS}
    assert rooms == {name.partition("_")[0] for name in PROGRAMS} == {"shared", "cpu", "cuda", "bundle"}


@pytest.mark.parametrize("room", PROGRAMS)
def test_a_room(room, include, tmp_path):
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    program = tmp_path / room
    flags = ["-pthread", PROGRAMS[room], "-o", program, f"-L{library}", f"-Wl,-rpath,{library}", "-ltvm_ffi", "-ldl"]
    assert gxx("-g", "-fsanitize=undefined", "-fno-sanitize-recover", *flags, include=include) == ""
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("place", HEADERS)
def test_a_header_includes_what_it_needs(place, include, tmp_path):
    source = tmp_path / "alone.cc"
    source.write_text(f'#include "{place}"\n#include "{place}"\n')
    assert gxx("-fsyntax-only", source, include=include) == ""


def test_headers_of_a_host_are_those_that_it_includes():
    found = host.headers(render(BASE))
    assert all(place.startswith(("shared/", "cpu/")) for place in found)
    assert {place for text in found.values() for place in re.findall(r'#include "(.*)"', text)} <= found.keys()


def render(spec=BASE, pipeline="fused"):
    tiles = tiling.choose(spec, CPU, pipeline)
    return host.render(spec, tiles, CPU, pipeline, host.kernels(backend.build_kernels(spec, tiles, pipeline)))


def refusal(text, include, tmp_path):
    """What g++ says of a host."""
    source = tmp_path / "host.cc"
    source.write_text(text)
    return gxx("-fsyntax-only", "-Wno-error", source, include=include)


@pytest.mark.parametrize("pipeline", ["fused", "staged"])
@pytest.mark.parametrize("name", ["float32", "bfloat16_packed"])
def test_a_host_compiles_without_a_warning(name, pipeline, include, tmp_path):
    assert refusal(render(SPECS[name], pipeline), include, tmp_path) == ""


STRIDES = ("k_block", "k_row", "k_head", "v_block", "v_row", "v_head")


@pytest.mark.parametrize("distance", [1, 3], ids=["of_this_cache", "of_the_other_cache"])
@pytest.mark.parametrize("name", STRIDES)
def test_one_stride_in_the_table_for_another_is_refused(name, distance, include, tmp_path, monkeypatch):
    texts = installation.templates()
    table = texts["cpu/calls.j2"]
    values = dict(re.findall(r'"(\w+)": "(args\.\w+_cache\.\w+_stride)"', table))
    assert tuple(values) == STRIDES
    other = STRIDES[(STRIDES.index(name) + distance) % len(STRIDES)]
    wrong = table.replace(f'"{name}": "{values[name]}"', f'"{name}": "{values[other]}"')
    monkeypatch.setattr(installation, "templates", lambda: texts | {"cpu/calls.j2": wrong})
    text = render()
    assert f".{name} = {values[other]}" in text
    assert "error: use of deleted function" in refusal(text, include, tmp_path)


SCORED = dataclasses.replace(BASE, window=100, alibi=True, sinks=True)
HEADS = {  # kernels that take a number for each head, and what else they take then
    "fused": {"fused_decode": ("alibi_slopes", "sinks"), "merge_partials": ("sinks",)},
    "staged": {"softmax_prepare": ("alibi_slopes", "head_start", "num_rows"), "normalize": ("sinks",)},
}


@pytest.mark.parametrize("pipeline", HEADS)
def test_kernels_may_take_numbers_of_heads(pipeline, include, tmp_path):
    tiles = tiling.choose(SCORED, CPU, pipeline)
    kernels = []
    for kernel in host.kernels(backend.build_kernels(SCORED, tiles, pipeline)):
        names = HEADS[pipeline].get(kernel.name, ())
        taken = [each for each in kernel.parameters if each.name not in names]
        types = {"head_start": "int64_t", "num_rows": "int64_t"}
        taken += [host.KernelParameter(name, types.get(name, "Array")) for name in names]
        kernels.append(kernel._replace(parameters=tuple(taken)))
    text = host.render(SCORED, tiles, CPU, pipeline, kernels)
    for name in ("alibi_slopes", "sinks"):
        assert text.count(f".{name} = args.{name}") == sum(name in taken for taken in HEADS[pipeline].values())
    assert refusal(text, include, tmp_path) == ""


def test_a_spec_says_what_it_has():
    for spec, constants in (
        (BASE, ("kWindow = 0;", "kAlibi = false, kSinks = false;")),
        (SCORED, ("kWindow = 100;", "kAlibi = true, kSinks = true;")),
        (dataclasses.replace(BASE, sinks=True), ("kWindow = 0;", "kAlibi = false, kSinks = true;")),
    ):
        text = render(spec)
        assert all(each in text for each in constants)


def test_two_arguments_in_the_order_of_another_kernel_are_refused(include, tmp_path):
    text = render()
    one, other = ".block_begin = item.block_begin", ".block_end = item.block_end"
    assert one in text
    assert other in text
    wrong = text.replace(one, "@").replace(other, one).replace("@", other)
    assert "designator order for field" in refusal(wrong, include, tmp_path)


def test_an_argument_that_is_left_out_is_refused(include, tmp_path):
    text = render()
    without, count = re.subn(r"\.num_seqs = item\.num_seqs,\s", "", text)
    assert count == 1
    assert "error:" in refusal(without, include, tmp_path)


def test_a_call_follows_the_kernel(include, tmp_path):
    """A kernel with its parameters in another order is called in that order, by the same table."""
    tiles = tiling.choose(BASE, CPU, "fused")
    decode, *others = host.kernels(backend.build_kernels(BASE, tiles, "fused"))
    turned = decode._replace(parameters=decode.parameters[::-1])
    text = host.render(BASE, tiles, CPU, "fused", [turned, *others])
    call = text[text.index("Call(FusedDecode{") :].partition("});")[0]
    assert re.findall(r"\.(\w+) = ", call) == [parameter.name for parameter in turned.parameters]
    assert refusal(text, include, tmp_path) == ""


@pytest.fixture(scope="module")
def cuda_source():
    """CUDA C of a spec's kernels, which says what they take."""
    return cuda_backend.lower(ON_CUDA, GPU).cuda


def render_cuda(source):
    tiles = cuda_tiling.choose(ON_CUDA, GPU.arch)
    return cuda_host.render_fused(ON_CUDA, tiles, GPU, source, launches.launches(ON_CUDA, tiles))


def test_a_gpus_host_compiles_without_a_warning(cuda_source, include, tmp_path):
    assert refusal(render_cuda(cuda_source), include, tmp_path) == ""


@pytest.mark.parametrize("name", STRIDES)
def test_one_stride_for_another_is_refused_on_a_gpu(name, cuda_source, include, tmp_path, monkeypatch):
    """In decode's table and in append_kv's."""
    texts = installation.templates()
    table = texts["cuda/launches.j2"]
    values = re.findall(rf'"{name}": "(.*_stride)"', table)
    other = STRIDES[(STRIDES.index(name) + 1) % len(STRIDES)]
    wrong = re.findall(rf'"{other}": "(.*_stride)"', table)
    assert len(values) == len(wrong) == 2
    for right_value, wrong_value in zip(values, wrong, strict=True):
        table = table.replace(f'"{name}": "{right_value}"', f'"{name}": "{wrong_value}"')
    monkeypatch.setattr(installation, "templates", lambda: texts | {"cuda/launches.j2": table})
    words = refusal(render_cuda(cuda_source), include, tmp_path)
    assert words.count("error: conversion from") == 2


def test_a_parameter_without_a_value_is_an_error_of_the_template():
    tiles = tiling.choose(BASE, CPU, "fused")
    decode, *others = host.kernels(backend.build_kernels(BASE, tiles, "fused"))
    more = decode._replace(parameters=(*decode.parameters, host.KernelParameter("window", "int64_t")))
    with pytest.raises(jinja2.UndefinedError, match=r"^fused_decode: the table of its call has no value for window$"):
        host.render(BASE, tiles, CPU, "fused", [more, *others])
