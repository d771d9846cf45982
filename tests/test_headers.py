"""The hosts' headers by themselves, each room with a program of tests; and what the C++ compiler refuses for us."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import jinja2
import pytest
import tvm_ffi.libinfo
from specs import BASE, SPECS

from pa_compiler import host, installation, native
from pa_compiler.cpu import backend, target
from pa_compiler.cpu import tiles as tiling

CPU = target.CpuTarget('{"kind": "llvm"}', frozenset({"avx", "avx2", "fma"}))
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
    assert {place.partition("/")[0] for place in HEADERS} == PROGRAMS.keys() == {"shared", "cpu", "cuda"}


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
    values = dict(re.findall(r'"(\w+)": "(args\.\w+\.\w+_stride)"', table))
    assert tuple(values) == STRIDES
    other = STRIDES[(STRIDES.index(name) + distance) % len(STRIDES)]
    wrong = table.replace(f'"{name}": "{values[name]}"', f'"{name}": "{values[other]}"')
    monkeypatch.setattr(installation, "templates", lambda: texts | {"cpu/calls.j2": wrong})
    text = render()
    assert f".{name} = {values[other]}" in text
    assert "error: use of deleted function" in refusal(text, include, tmp_path)


def test_two_arguments_in_the_order_of_another_kernel_are_refused(include, tmp_path):
    text = render()
    one, other = ".block_begin = item.block_begin", ".block_end = item.block_end"
    assert one in text
    assert other in text
    wrong = text.replace(one, "@").replace(other, one).replace("@", other)
    assert "designator order for field" in refusal(wrong, include, tmp_path)


def test_an_argument_that_is_left_out_is_refused(include, tmp_path):
    text = render()
    assert text.count(".num_seqs = item.num_seqs, ") == 1
    assert "error:" in refusal(text.replace(".num_seqs = item.num_seqs, ", ""), include, tmp_path)


def test_a_call_follows_the_kernel(include, tmp_path):
    """A kernel with its parameters in another order is called in that order, by the same table."""
    tiles = tiling.choose(BASE, CPU, "fused")
    decode, *others = host.kernels(backend.build_kernels(BASE, tiles, "fused"))
    turned = decode._replace(parameters=decode.parameters[::-1])
    text = host.render(BASE, tiles, CPU, "fused", [turned, *others])
    call = text[text.index("Call(FusedDecode{") :].partition("});")[0]
    assert re.findall(r"\.(\w+) = ", call) == [parameter.name for parameter in turned.parameters]
    assert refusal(text, include, tmp_path) == ""


def test_a_parameter_without_a_value_is_an_error_of_the_template():
    tiles = tiling.choose(BASE, CPU, "fused")
    decode, *others = host.kernels(backend.build_kernels(BASE, tiles, "fused"))
    more = decode._replace(parameters=(*decode.parameters, host.KernelParameter("window", "int64_t")))
    with pytest.raises(jinja2.UndefinedError, match=r"^fused_decode: the table of its call has no value for window$"):
        host.render(BASE, tiles, CPU, "fused", [more, *others])
