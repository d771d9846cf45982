"""Where files may lie: caches that cannot be used, and paths with anything in them."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import re
import shutil
import tempfile
import warnings

import pytest
from click.testing import CliRunner
from inputs import make_inputs
from specs import BASE
from test_commands import HOST, KERNELS
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec, compiler, native
from pa_compiler.cli import main as cli
from pa_compiler.cuda import build as cuda_build
from pa_compiler.runtime import loader

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")


@pytest.fixture(autouse=True)
def warn_anew():
    compiler._warn_of_no_cache.cache_clear()
    yield
    compiler._warn_of_no_cache.cache_clear()


def of_somebody_else(path):
    path.mkdir()
    if os.getuid() != 0:
        pytest.skip("a directory of somebody else is left out: only root gives one away")
    os.chown(path, 12345, 12345)


def open_to_others(path):
    path.mkdir()
    path.chmod(0o777)


def link(path):
    path.with_name("elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")


SPOILED = {
    "a file": (lambda path: path.touch(), "File exists"),
    "below a file": (lambda path: (path.parent.rmdir(), path.parent.touch()), "Not a directory"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "File exists"),
    "a link": (link, "got a symbolic link to elsewhere"),
    "open to others": (open_to_others, "of mode 0700, got 0777; chmod 700 closes it"),
    "of somebody else": (of_somebody_else, "owned by user 0, got 12345"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "File exists"),
    "below a link to itself": (
        lambda path: (path.parent.rmdir(), path.parent.symlink_to(path.parent.name)),
        "symbolic links",
    ),
}


@pytest.fixture(params=SPOILED)
def spoiled(request, tmp_path):
    """(a cache directory that cannot be used, what says why)."""
    spoil, reason = SPOILED[request.param]
    path = tmp_path / "caches" / "pa_compiler"
    path.parent.mkdir()
    spoil(path)
    return path, reason


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.scorecard(26)
def test_without_a_usable_cache_directory_of_the_user_there_is_one_warning(faked_builds, spoiled, monkeypatch, figure):
    path, reason = spoiled
    monkeypatch.delenv("PA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent))
    says = f"^libraries are compiled without a cache: .*PA_CACHE_DIR to name another, got: .*{re.escape(reason)}"
    with pytest.warns(RuntimeWarning, match=says) as warned:
        assert pa_compiler.compile(BASE).spec == BASE
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pa_compiler.compile(BASE)
    assert len(faked_builds) == 2
    assert not path.is_dir() or not list(path.iterdir())
    figure("cache directories", 1)


@pytest.mark.scorecard(26)
def test_a_directory_that_was_named_must_be_usable(faked_builds, spoiled, monkeypatch, tmp_path, figure):
    path, reason = spoiled
    monkeypatch.setenv("PA_CACHE_DIR", str(path))
    says = rf"PA_CACHE_DIR: expected .*, or compile\(cache=False\), got: .*{re.escape(reason)}"
    with pytest.raises(OSError, match=says) as caught:
        pa_compiler.compile(BASE)
    assert str(path) in str(caught.value)
    for command in ("dir", "clear"):
        result = invoke("cache", command)
        assert result.exit_code == 1
        assert re.search(says, result.stderr)
    assert not faked_builds
    assert pa_compiler.compile(BASE, cache=False).spec == BASE
    with pytest.warns(RuntimeWarning, match=says):
        assert invoke("build", "-o", tmp_path / "pa.so").exit_code == 0
    assert pa_compiler.load(tmp_path / "pa.so").spec == BASE
    figure("cache directories", 1)


def test_a_user_without_a_home_and_without_a_name(faked_builds, monkeypatch, tmp_path):
    """~ stands for nothing then: no directory of that name is made."""
    for name in ("PA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"without a cache: .* got: ~/\.cache/pa_compiler: expected an absolute"):
        assert pa_compiler.compile(BASE).spec == BASE
    assert not list(tmp_path.iterdir())
    result = invoke("cache", "dir")
    assert (result.exit_code, "by XDG_CACHE_HOME, by HOME" in result.stderr) == (1, True)


@pytest.mark.parametrize("chosen", [True, False], ids=["PA_CACHE_DIR", "HOME"])
def test_a_full_disk(faked_builds, monkeypatch, tmp_path, chosen):
    """Only what is to be written to the cache fails."""
    monkeypatch.delenv("PA_CACHE_DIR")
    monkeypatch.setenv("PA_CACHE_DIR" if chosen else "XDG_CACHE_HOME", str(tmp_path / "full"))
    make = tempfile.mkdtemp

    def full(suffix=None, prefix=None, dir=None):  # noqa: A002
        if str(dir).startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    says = f"got: No space left on device: '{tmp_path}/full/"
    if chosen:
        with pytest.raises(OSError, match=f"PA_CACHE_DIR: .* {says}") as caught:
            pa_compiler.compile(BASE)
        assert caught.value.errno == errno.ENOSPC
    else:
        with pytest.warns(RuntimeWarning, match=f"without a cache: .* {says}"):
            assert pa_compiler.compile(BASE).spec == BASE


CHARACTERS = {
    "comma": "a,b",
    "space": "a b",
    "quotes": "a'b\"c`d",
    "percent": "a%sb%n",
    "newline": "a\nb",
    "backslash": "a\\nb\\",
    "not_ascii": "ä漢😀",
    "dash": "-rf",
    "shell": "$(touch x);*?#&|<>~!{}[]",
    "at": "@a=b",
}
ALL = " ".join(CHARACTERS.values())


@pytest.mark.scorecard(26)
@pytest.mark.parametrize("name", [*CHARACTERS.values(), ALL], ids=[*CHARACTERS, "all"])
def test_a_library_is_linked_in_any_directory(tmp_path, monkeypatch, name, figure):
    """A version script and an image are named to the linker and to the assembler."""
    directory, image = tmp_path / name, b"an image\0 of a GPU's code"
    directory.mkdir()
    kernels = [KERNELS, native.embedded("pa_kernels_image", image, directory)]
    host = f'extern "C" const char pa_kernels_image[];\n{HOST}'.replace("return 0", "return pa_kernels_image[3]")
    with native.compiling_host(host, directory) as compiling:
        library = native.link(compiling, kernels, directory, ["decode"])
    os.chmod(library, 0o755)
    shutil.copy(library, tmp_path / "pa.so")
    assert ctypes.CDLL(str(tmp_path / "pa.so")).__tvm_ffi_decode() == image[3]
    figure("odd paths", 1)


@pytest.mark.skipif(cuda_build.find_tool("nvcc") is None, reason="nvcc is not there: it is given no odd paths")
def test_nvcc_works_in_any_directory_that_its_shell_takes(tmp_path):
    directory = tmp_path / ALL.replace("$", "").replace("`", "")
    directory.mkdir()
    cubin = cuda_build.assemble('extern "C" __global__ void f_kernel(float* x) { x[0] = 1; }', "sm_90", directory)
    assert cuda_build.fatbin(cubin, "sm_90", directory)


@pytest.mark.parametrize("name", ["a$b", "a`b", "$(touch x)"])
def test_nvcc_is_not_run_where_its_shell_would_take_the_path_for_a_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(cuda_build, "_run", lambda *_: pytest.fail("it was run"))
    with pytest.raises(RuntimeError, match=r"expected a directory without \$ and `.* PA_CACHE_DIR"):
        cuda_build.assemble("", "sm_90", tmp_path / name)


def compile_in(name, variable, tmp_path, monkeypatch):
    """A module that was compiled with a directory of this name in a variable, and dumped, saved and loaded there."""
    monkeypatch.chdir(tmp_path)
    directory = name if variable == "PA_CACHE_DIR" else str(tmp_path / name)  # which may be relative
    os.mkdir(directory, 0o700)
    monkeypatch.setenv(variable, directory)
    monkeypatch.setattr(tempfile, "tempdir", None)
    module = pa_compiler.compile(SPEC, cache=variable == "PA_CACHE_DIR", dump_dir=tmp_path / "dumps" / name)
    dumped = sorted((tmp_path / "dumps" / name).glob("?_*"))
    assert [path.read_text() for path in dumped] == list(module.sources.values())
    module.save(tmp_path / name / "pa")
    monkeypatch.setattr(loader, "_LOADED", {})
    loaded, inputs = pa_compiler.load(os.path.join(name, "pa")), make_inputs(SPEC, [0, 1, 5])
    assert_same_bits(loaded.decode(*inputs.arguments), module.decode(*inputs.arguments))
    return module


ODD = [ALL, *CHARACTERS.values()]


@pytest.mark.scorecard(26)
@pytest.mark.parametrize("variable", ["PA_CACHE_DIR", "TMPDIR"])
def test_compiles_in_any_directory(compiled, variable, tmp_path, monkeypatch, count, figure):
    expected = compiled(SPEC, attend=True).sources
    names = ODD[: count(1, None)] if variable == "PA_CACHE_DIR" else ODD[: count(0, None)]
    for name in names:
        module = compile_in(name, variable, tmp_path, monkeypatch)
        assert {stage: module.sources[stage] for stage in ("host", "asm")} == {
            stage: expected[stage] for stage in ("host", "asm")
        }
        assert module.sources["llvm"].splitlines()[0].startswith(("source_filename", "target"))
    figure("odd paths", len(names))


@pytest.mark.scorecard(26)
@pytest.mark.parametrize("name", [*CHARACTERS.values(), ALL], ids=[*CHARACTERS, "all"])
def test_the_command_writes_and_reads_files_of_any_name(faked_builds, own_cache, tmp_path, monkeypatch, name, figure):
    name = name.replace("/", "")
    monkeypatch.chdir(tmp_path)
    for output in (name, f"{name}.so", os.fsdecode(b"\xff.so")):
        assert invoke("build", "-o", output).exit_code == 0
        assert pa_compiler.load(output).spec == BASE
        assert invoke("show", "--", output).exit_code == 0
    figure("odd paths", 3)


def test_a_directory_whose_name_is_not_utf8(compiled, tmp_path, monkeypatch):
    """TVM reads no file there, which is said; libraries are written and loaded."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(odd, 0o700)
    with monkeypatch.context() as patch:
        patch.setenv("PA_CACHE_DIR", odd)
        with pytest.raises(RuntimeError, match=r"\\xff/.*: expected a directory whose name is UTF-8.*PA_CACHE_DIR"):
            pa_compiler.compile(SPEC)
    assert all(name.endswith(".lock") for name in os.listdir(odd))
    module = compiled(SPEC)
    module.save(f"{odd}/pa.so")
    monkeypatch.setenv("TMPDIR", odd)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(loader, "_LOADED", {})
    inputs = make_inputs(SPEC, [0, 1, 5])
    out = pa_compiler.load(f"{odd}/pa.so").decode(*inputs.arguments)
    assert_same_bits(out, module.decode(*inputs.arguments))
