"""A library runs where there is no compiler, with tvm-ffi, NumPy and ml_dtypes alone, and with a range of tvm-ffi."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tvm_ffi
from click.testing import CliRunner
from inputs import make_inputs
from runtime_calls import LENGTHS
from specs import BASE, SPECS

import pa_compiler
from pa_compiler import PagedAttentionSpec, backends, compiler, native
from pa_compiler.cli import library as library_cli
from pa_compiler.cli import main as cli
from pa_compiler.cpu import target
from pa_compiler.cuda import backend as cuda_compiler
from pa_compiler.cuda import target as cuda_target
from pa_compiler.runtime import manifest, versions

BASE_PACKAGES = {"apache-tvm-ffi", "ml-dtypes", "numpy", "pa-compiler", "typing-extensions"}
"""Those of the base dependencies, and what tvm-ffi needs."""

SUPPORT = Path(__file__).parent / "support"
BLOCKING = """
import pkgutil, runpy, sys
script, allowed = sys.argv.pop(1), {*sys.argv.pop(1).split(",")}
blocked = {module.name for module in pkgutil.iter_modules()} - allowed - sys.stdlib_module_names - sys.modules.keys()
sys.modules.update(dict.fromkeys(blocked))
runpy.run_path(script, run_name="__main__")
"""
"""A program that runs a script where of all that is installed these modules alone can be imported."""

ALLOWED = "pa_compiler,tvm_ffi,numpy,ml_dtypes,typing_extensions,inputs,dlpack"


@pytest.fixture(scope="module")
def libraries(compiled, gpu_module, tmp_path_factory):
    """A folder of libraries for runtime_calls.py: every type and layout, both pipelines, and one for a GPU."""
    folder = tmp_path_factory.mktemp("libraries")
    for name, pipeline in (*((name, "fused") for name in SPECS), ("float16", "staged")):
        module = compiled(SPECS[name], pipeline)
        out, lse = module.decode(*make_inputs(SPECS[name], LENGTHS).arguments, return_lse=True)
        module.save(folder / f"{name}_{pipeline}.so")
        (folder / f"{name}_{pipeline}.bits").write_bytes(out.tobytes() + lse.tobytes())
    gpu_module(PagedAttentionSpec(2, 1, 16, 16, "float32")).save(folder / "cuda.so")
    return folder


@pytest.fixture
def version(monkeypatch):
    """version(package, "1.2.3"): the package seems to be of another version."""

    def pretend(package, number):
        if package == "apache-tvm-ffi":
            monkeypatch.setattr(tvm_ffi, "__version__", number)
        else:
            monkeypatch.delitem(sys.modules, "tvm", raising=False)
            real = importlib.metadata.version
            monkeypatch.setattr(importlib.metadata, "version", lambda of: number if of == package else real(of))
        forget()

    def forget():
        versions.check_runtime.cache_clear()
        versions.check_compiler.cache_clear()

    yield pretend
    monkeypatch.undo()
    forget()


def run(*command, **environment):
    """What a command prints, which must succeed."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built_environment(name):
    """The Python of an environment that has what a library needs to run, and nothing else."""
    python = Path(f"{sys.prefix}-runtime") / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is not there: libraries are not run in an environment of their own (make runtime-envs)")
    return python


def test_runs_where_nothing_else_can_be_imported(libraries):
    command = [sys.executable, "-c", BLOCKING, SUPPORT / "runtime_calls.py", ALLOWED]
    assert "7 libraries" in run(*command, libraries, *versions.COMPILES_WITH, PYTHONPATH=str(SUPPORT))


@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_runs_in_an_environment_of_the_base_dependencies(libraries, name):
    python = built_environment(name)
    names = "import importlib.metadata as m; print(*(d.metadata['Name'] for d in m.distributions()), sep=',')"
    installed = {name.lower().replace("_", "-") for name in run(python, "-c", names).strip().split(",")}
    assert BASE_PACKAGES - installed == set()
    assert installed - BASE_PACKAGES <= {"pip", "setuptools"}
    printed = run(python, SUPPORT / "runtime_calls.py", libraries, *versions.COMPILES_WITH)
    assert "7 libraries" in printed
    assert (f"tvm-ffi {dotted(versions.RUNS_WITH[0])}:" in printed) == (name == "oldest"), printed
    assert "Usage: pa-compiler" not in run(python.with_name("pa-compiler"), "--help")


def test_the_dependencies_are_the_versions_that_are_checked():
    requirements = [text.replace(" ", "") for text in importlib.metadata.requires("pa-compiler")]
    extra = [text.partition(";")[0] for text in requirements if text.endswith('extra=="compiler"')]
    assert {text for text in extra if "==" in text} == {f"{name}=={pin}" for name, pin in versions.PINNED.items()}
    assert {re.match(r"[\w-]+", text)[0] for text in extra} == {*versions.COMPILES_WITH, *versions.PINNED}
    base = {re.match(r"[\w-]+", text)[0]: text for text in requirements if "extra" not in text}
    assert base.keys() == {"apache-tvm-ffi", "ml_dtypes", "numpy"}
    assert set(re.findall("[<>=]+[^,]+", base["apache-tvm-ffi"])) == set(versions.runs_with().split(","))
    oldest, (*of_end, last) = versions.RUNS_WITH
    stated = f"apache-tvm-ffi {dotted(oldest)} to {dotted((*of_end, last - 1))}, NumPy and ml_dtypes"
    assert stated in (SUPPORT.parents[1] / "README.md").read_text()


def dotted(release):
    return ".".join(map(str, release))


@pytest.mark.parametrize(
    "number", ["0.1.6", "0.1.6.post1", "0.1.8.post2", "0.1.14.post1", "0.1.15.post2", "0.1.15.dev3"]
)
def test_a_tvm_ffi_of_the_range_loads(version, libraries, number):
    version("apache-tvm-ffi", number)
    assert pa_compiler.load(libraries / "float32_fused.so").spec == BASE


@pytest.mark.parametrize(
    "number", ["0.1.5", "0.0.0.dev0", "0.1", "0.1.16", "0.1.16.dev0", "0.1.100", "0.2.0rc1", "1.0"]
)
def test_a_tvm_ffi_out_of_the_range_is_named(version, libraries, monkeypatch, number):
    monkeypatch.setattr(tvm_ffi, "load_module", lambda _: pytest.fail("it was loaded"))
    version("apache-tvm-ffi", number)
    with pytest.raises(
        RuntimeError, match=r"^apache-tvm-ffi: expected a version >=0\.1\.6,<0\.1\.16, .* got " + number
    ):
        pa_compiler.load(libraries / "float32_fused.so")


def test_show_names_the_tvm_ffi_that_is_here(version, libraries, capsys):
    library_cli.main(["show", str(libraries / "float32_fused.so")])
    printed = " ".join(capsys.readouterr().out.split())
    built_with, here = importlib.metadata.version("apache-tvm-ffi"), tvm_ffi.__version__
    assert f"apache-tvm-ffi {built_with}, pa-compiler" in printed
    assert f"here apache-tvm-ffi {here}; libraries are tested with >=0.1.6,<0.1.16" in printed
    version("apache-tvm-ffi", "0.1.5")
    library_cli.main(["show", str(libraries / "float32_fused.so")])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "loads no: apache-tvm-ffi: expected a version >=0.1.6,<0.1.16, with which libraries are tested, got 0.1.5"
        in printed
    )


def test_what_another_libtvm_ffi_lacks_is_an_error_of_loading(tmp_path, compiled):
    """As a library would have it that was built with a newer one."""
    source, plain = tmp_path / "host.cc", tmp_path / "plain.so"
    source.write_text(
        'extern "C" int TVMFFIOfTheFuture(); extern "C" int __tvm_ffi_decode() { return TVMFFIOfTheFuture(); }'
    )
    run(*native.cxx(), "-shared", "-fPIC", "-Wl,-z,now", source, "-o", plain)
    about = compiled(BASE).manifest
    library = tmp_path / "pa.so"
    library.write_bytes(manifest.seal(plain.read_bytes(), about))
    with pytest.raises(RuntimeError, match=r"^pa\.so: .*undefined symbol: TVMFFIOfTheFuture") as caught:
        pa_compiler.load(library)
    assert f"It was built with apache-tvm-ffi {about.versions['apache-tvm-ffi']}, and here is " in str(caught.value)
    assert "BIND_NOW" in run("readelf", "-d", compiled_library(compiled(BASE), tmp_path))


def compiled_library(module, folder):
    module.save(folder / "saved.so")
    return folder / "saved.so"


WRONG = [("apache-tvm-ffi", "0.1.15.post2"), ("apache-tvm-ffi", "0.1.13"), ("apache-tvm", "0.26.0")]


@pytest.mark.parametrize(("package", "number"), WRONG)
@pytest.mark.parametrize(
    "call",
    [
        lambda: pa_compiler.compile(BASE),
        lambda: pa_compiler.compile(BASE, cache=False),
        lambda: pa_compiler.compile(BASE, "cuda"),
        lambda: compiler.emit(BASE),
        lambda: target.resolve(backends.normalize("llvm")),
        lambda: cuda_compiler.lower(SPECS["float16"], cuda_target.CudaTarget("sm_90")),
    ],
    ids=["compile", "no_cache", "cuda", "emit", "resolve", "cuda_lower"],
)
def test_nothing_compiles_with_other_versions(version, package, number, call):
    version(package, number)
    with pytest.raises(RuntimeError, match=rf"^{package}: expected version {versions.PINNED[package]}, got {number}\."):
        call()


@pytest.mark.parametrize("words", ["run", "bench", "build -o pa.so", "inspect", "explain", "generate --check"])
def test_commands_say_that_versions_are_others(version, words):
    version("apache-tvm-ffi", "0.1.15.post2")
    result = CliRunner().invoke(cli.main, words.split(), catch_exceptions=False)
    assert result.exit_code == 1
    assert "Error: apache-tvm-ffi: expected version 0.1.14.post1, got 0.1.15.post2." in result.stderr


def test_all_that_is_wrong_is_named(version):
    for package, number in WRONG:
        version(package, number)
    with pytest.raises(RuntimeError, match=r"^apache-tvm: .* got 0\.26\.0; apache-tvm-ffi: .* got 0\.1\.13\."):
        pa_compiler.compile(BASE)


def test_other_versions_are_found_before_tvm_is_imported():
    code = """
import sys, tvm_ffi, pa_compiler
tvm_ffi.__version__ = "0.1.15.post2"
try:
    pa_compiler.compile(pa_compiler.PagedAttentionSpec(2, 1, 16, 16, "float32"), cache=False)
except RuntimeError as error:
    print(error, [name for name in sys.modules if name.startswith("tvm.")])
"""
    printed = run(sys.executable, "-c", code)
    assert "apache-tvm-ffi: expected version 0.1.14.post1, got 0.1.15.post2." in printed
    assert "[]" in printed


@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_a_real_tvm_ffi_of_another_version_is_found_before_it_ends_the_process(name):
    """TVM of this environment, and tvm-ffi of another."""
    python = built_environment(name)
    where = run(python, "-c", "import sysconfig, tvm_ffi; print(sysconfig.get_path('purelib'), tvm_ffi.__version__)")
    packages, number = where.split()
    code = (
        "import pa_compiler; pa_compiler.compile(pa_compiler.PagedAttentionSpec(2, 1, 16, 16, 'float32'), cache=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, f"got {number}." in done.stderr) == (1, True), done
