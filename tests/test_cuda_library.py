"""A library for a GPU as a file: what nvcc makes of it, what it says of itself, and where it does not run."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pa_compiler
from pa_compiler import CudaModule, PagedAttentionSpec, compiler, host
from pa_compiler.cli import main as cli
from pa_compiler.cuda import build as cuda_build
from pa_compiler.interface import CUDA_ENTRY_POINTS
from pa_compiler.runtime import manifest

SPEC = PagedAttentionSpec(4, 1, 64, 16, "float16")
PACKED = PagedAttentionSpec(4, 1, 64, 16, "float16", kv_layout="packed")
DRIVER = Path(__file__).parent.parent / "generated" / "include" / "cuda" / "driver.h"

needs_nvcc = pytest.mark.skipif(
    cuda_build.find_tool("nvcc") is None, reason="nvcc is not there: no CUDA library is compiled as users do"
)


@pytest.fixture(scope="module")
def module(build_cache):
    return pa_compiler.compile(SPEC, target="cuda")


@needs_nvcc
def test_what_it_is_made_of(module):
    assert isinstance(module, CudaModule)
    assert module.target == {"kind": "cuda", "arch": "sm_90"}
    stages = ["tensorir", "cuda", "host", "ptx"] + ["sass"] * bool(cuda_build.find_tool("nvdisasm"))
    assert list(module.sources) == stages
    assert "cp.async" in module.sources["cuda"]
    assert ".target sm_90" in module.sources["ptx"]
    assert module.manifest.kernels == hashlib.sha256(module.sources["ptx"].encode()).hexdigest()
    assert module.manifest.unfit() == ""


SIZES = {"CUdeviceptr": 8, "int64_t": 8, "int32_t": 4, "float": 4, **dict.fromkeys(host.STRIDES.values(), 8)}


@needs_nvcc
def test_kernels_take_what_the_host_gives(module):
    """Parameter for parameter: nvcc's of each kernel, and the variables whose addresses are passed."""
    text, ptx = module.sources["host"], module.sources["ptx"]
    launches = re.findall(r"values\[\] = \{([^}]*)\};\s*call\.Launch<Spec>\(Spec::k(\w+),", text)
    assert len(launches) == 8
    for values, kernel in launches:
        name = re.sub(r"(?<!^)([A-Z])", r"_\1", kernel).lower() + "_kernel"
        function = re.search(r"void Launch(?:(?!^\}).)*" + re.escape(values), text, re.DOTALL | re.MULTILINE)[0]
        types = {name: kind for kind, name in re.findall(r"^  ([\w<>]+) (\w+) = ", function, re.MULTILINE)}
        given = [SIZES[types[value.strip(" &\n")]] for value in values.split(",")]
        (taken,) = re.findall(rf"^\.visible \.entry {name}\(\n(.*?)\n\)", ptx, re.DOTALL | re.MULTILINE)
        assert [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", taken)] == given, name


@needs_nvcc
def test_what_it_needs(module, tmp_path):
    """tvm-ffi and the C and C++ libraries: no library of CUDA's, whose driver is looked for when there is a call."""
    module.save(tmp_path / "pa.so")
    text = subprocess.run(["readelf", "-d", tmp_path / "pa.so"], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(\w+)", text))
    assert "libtvm_ffi" in needed
    assert needed <= {"libtvm_ffi", "libstdc", "libgcc_s", "libm", "libc", "libdl", "libpthread", "ld"}
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", tmp_path / "pa.so"], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert names == {f"__tvm_ffi_{name}" for name in CUDA_ENTRY_POINTS if name != "merge_states"}


CALL = """
import sys, numpy as np, pa_compiler
sys.path.insert(0, {support!r})
from dlpack import CUDA, Exported
module = pa_compiler.load({path!r})
arrays = {{
    "query": np.zeros((1, 4, 64), np.float16), "key_cache": np.zeros((2, 16, 1, 64), np.float16),
    "value_cache": np.zeros((2, 16, 1, 64), np.float16), "block_table": np.zeros((1, 2), np.int32),
    "context_lens": np.zeros(1, np.int32), "out": np.zeros((1, 4, 64), np.float16),
}}
def aligned(array):
    room = np.zeros(array.nbytes + 16, np.uint8)
    return room[-room.ctypes.data % 16 :][: array.nbytes].view(array.dtype).reshape(array.shape)
arrays = {{name: Exported(aligned(array), device=CUDA) for name, array in arrays.items()}}
module.check_status()
for change in ({{"scale": float("nan")}}, {{}}):
    try:
        module.decode(**arrays | change)
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
assert "tvm" not in sys.modules
"""


def in_a_process(module, tmp_path, **environment):
    """What a process prints that loads a module and calls it, without TVM."""
    module.save(tmp_path / "pa.so")
    code = CALL.format(support=str(Path(__file__).parent / "support"), path=str(tmp_path / "pa.so"))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@needs_nvcc
def test_without_a_driver(module, tmp_path):
    """It loads, and checks arguments; a good call says what is missing."""
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a driver")
    bad, good = in_a_process(module, tmp_path)
    assert bad == "ValueError scale: expected a finite float32, got nan"
    assert good.startswith(
        "RuntimeError target: this module needs a GPU and NVIDIA's driver, which is not there: libcuda"
    )


@needs_nvcc
def test_with_an_old_driver(module, tmp_path):
    (tmp_path / "old.cc").write_text(
        'extern "C" int cuGetErrorName() { return 0; } extern "C" int cuGetErrorString() { return 0; }'
    )
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", tmp_path / "old.cc", "-o", library], check=True
    )
    _, good = in_a_process(module, tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert good == "RuntimeError target: expected NVIDIA's driver for CUDA 12.0 or later, got one without cuInit"


@needs_nvcc
def test_save_load_and_show(module, tmp_path):
    module.save(tmp_path / "pa.so")
    loaded = pa_compiler.load(tmp_path / "pa.so")
    assert isinstance(loaded, CudaModule)
    assert (loaded.spec, loaded.target, loaded.manifest) == (SPEC, module.target, module.manifest)
    shown = CliRunner().invoke(cli.main, ["show", str(tmp_path / "pa.so")])
    assert shown.exit_code == 0
    assert "cuda, sm_90" in shown.stdout
    assert manifest.read((tmp_path / "pa.so").read_bytes(), "pa.so") == module.manifest


@needs_nvcc
def test_from_the_cache(module, monkeypatch, tmp_path):
    """The same bytes, without a build; another toolkit, or other flags for it, is another entry."""
    names = []
    monkeypatch.setattr(
        compiler._cache, "get_or_build", lambda name, build: names.append(name) or {"pa.so": module._library}
    )
    assert pa_compiler.compile(SPEC, target="cuda")._library == module._library
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    pa_compiler.compile(SPEC, target="cuda")
    pa_compiler.compile(SPEC, target={"kind": "cuda", "arch": "sm_80"})
    (tmp_path / "nvcc").touch(mode=0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    pa_compiler.compile(SPEC, target="cuda")
    monkeypatch.setenv("NVCC", f"{tmp_path / 'nvcc'} -lineinfo")
    pa_compiler.compile(SPEC, target="cuda")
    assert len(set(names)) == 5


def test_without_nvcc(own_cache, monkeypatch):
    monkeypatch.setattr(cuda_build, "find_tool", lambda name: None)
    with pytest.raises(
        RuntimeError,
        match=r"^nvcc is neither in CUDA_HOME/bin nor on PATH; .* pip install 'pa-compiler\[compiler,cuda\]'$",
    ):
        pa_compiler.compile(SPEC, target="cuda")


def test_specs_that_it_does_not_take():
    with pytest.raises(ValueError, match=r"^kv_layout: expected NHD or HND for target cuda, got 'packed'$"):
        pa_compiler.compile(PACKED, target="cuda")
    with pytest.raises(ValueError, match=r"^head_dim: expected a multiple of 16 up to 256 for target cuda, got 24$"):
        pa_compiler.compile(PagedAttentionSpec(4, 1, 24, 16, "float16"), target="cuda")


@needs_nvcc
def test_what_a_gpu_has_not(module):
    with pytest.raises(AttributeError, match=r"num_threads: a module for a GPU has none"):
        module.num_threads = 2
    with pytest.raises(NotImplementedError, match=r"^plan: "):
        module.plan(np.zeros(1, np.int32))


def test_checks_of_a_cpu(compiled):
    spec = PagedAttentionSpec(6, 2, 24, 5, "float32")
    arrays = [
        np.zeros(shape, dtype) for shape, dtype in (((1, 6, 24), "f4"), ((1, 5, 2, 24), "f4"), ((1, 5, 2, 24), "f4"))
    ]
    arrays += [np.zeros((1, 1), np.int32), np.ones(1, np.int32)]
    assert compiled(spec).decode(*arrays, check="host").shape == (1, 6, 24)
    with pytest.raises(ValueError, match=r"^check: expected 'host' for a CPU module, got 'device'$"):
        compiled(spec).decode(*arrays, check="device")


CUDA_H = """
#include <cuda.h>
#include <cstddef>
#include <type_traits>
%s
namespace ours {
%s
}
template <typename R, typename S, typename... A, typename... B>
constexpr bool Alike(R (*)(A...), S (*)(B...)) {
  if constexpr (sizeof...(A) != sizeof...(B)) return false;
  else return ((sizeof(A) == sizeof(B)) && ...) && sizeof(R) == sizeof(S);
}
static_assert(sizeof(ours::CUmemPoolProps) == sizeof(::CUmemPoolProps));
static_assert(offsetof(ours::CUmemPoolProps, maxSize) == offsetof(::CUmemPoolProps, maxSize));
static_assert(offsetof(ours::CUmemPoolProps, location.id) == offsetof(::CUmemPoolProps, location.id));
%s
"""


def test_declarations_of_the_driver(tmp_path):
    """The driver's types, numbers and functions are those of the toolkit's cuda.h."""
    nvcc = cuda_build.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not there, nor cuda.h: the driver's declarations are not compared")
    text = DRIVER.read_text()
    declared = text[text.index("using CUresult = int;") : text.index("// The driver, found at the first call")]
    names = re.findall(r"^  (CU\w+) = \d+,$", declared, re.MULTILINE)
    functions = re.findall(r"^  F\((\w+)", declared, re.MULTILINE)
    assert (len(names), len(functions)) == (12, 30)
    numbers = [f"constexpr int expected_{name} = int({name});\n#undef {name}" for name in names]  # a few are macros
    checks = [f"static_assert(ours::{name} == expected_{name});" for name in names]
    checks += [
        f'static_assert(Alike(decltype(ours::Driver::{name}){{}}, decltype(&::{name}){{}}), "{name}");'
        for name in functions
    ]
    source = tmp_path / "declarations.cu"
    source.write_text(CUDA_H % ("\n".join(numbers), declared, "\n".join(checks)))
    done = subprocess.run(
        [nvcc, "-std=c++17", "-c", source, "-o", tmp_path / "d.o"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
