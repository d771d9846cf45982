"""Compilers as commands: what CXX and NVCC may hold, and what arrives of what a compiler says."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from pa_compiler import commands, dependencies, native
from pa_compiler.cuda import build as cuda_build

HOST = 'extern "C" __attribute__((visibility("default"))) int __tvm_ffi_decode() { return 0; }\n'
KERNELS = '    .section .note.GNU-stack, "", @progbits\n'


@pytest.fixture
def program(tmp_path):
    """program(name, script) -> the path of an executable."""

    def make(name, script, mode=0o755):
        path = tmp_path / name
        path.write_bytes(script if isinstance(script, bytes) else f"#!/bin/sh\n{script}\n".encode())
        path.chmod(mode)
        return path

    return make


def compile_host(directory):
    """A host of one function as a library."""
    directory.mkdir(exist_ok=True)
    with native.compiling_host(HOST, directory) as compiling:
        return native.link(compiling, [KERNELS], directory, ["decode"])


REAL = os.path.realpath(shutil.which("g++"))
CLANG = pytest.param("clang++", marks=pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not there"))
ACCEPTED = {
    "unset": None,
    "empty": "",
    "blank": "  ",
    "a name": "g++",
    "a path": REAL,
    "another compiler": CLANG,
    "flags": "g++ -m64 -pipe",
    "a launcher": "{dir}/ccache g++",
    "a launcher, and flags with quotes": '{dir}/ccache "g++" -DTEXT="a b" \'-DOTHER=x y\'',
    "a path with spaces": "{dir}/my compilers/g++",
    "a quoted path with spaces, and flags": '"{dir}/my compilers/g++" -m64',
    "one that warns": "{dir}/warns",
    "one that prints what is not UTF-8": "{dir}/latin1",
    "one that prints more than a pipe holds": "{dir}/talks",
}


@pytest.mark.scorecard(26)
@pytest.mark.parametrize("cxx", ACCEPTED.values(), ids=ACCEPTED)
def test_cxx_is_taken_as_build_tools_take_it(program, tmp_path, monkeypatch, figure, cxx):
    program("ccache", 'exec "$@"')
    (tmp_path / "my compilers").mkdir()
    program("my compilers/g++", 'exec g++ "$@"')
    program("warns", 'echo "warning: of another kind" >&2; exec g++ -Wall -Wextra "$@"')
    program("latin1", "printf 'w\\344hrend\\n' >&2; exec g++ \"$@\"")
    program("talks", 'yes warning | head -c 300000; yes warning | head -c 300000 >&2; exec g++ "$@"')
    if cxx is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", cxx.format(dir=tmp_path))
    assert compile_host(tmp_path / "built").read_bytes()[:4] == b"\x7fELF"
    figure("compilers", 1)


REFUSED = {
    "no-such-compiler": r"the C\+\+ compiler 'no-such-compiler' is not on PATH.*apt-get install g\+\+",
    "no-such-launcher g++": r"the C\+\+ compiler 'no-such-launcher' is not on PATH",
    "{dir}/not-executable": r"the C\+\+ compiler '.*/not-executable' is not on PATH",
    'g++ "-DTEXT': r"CXX: expected a command, got 'g\+\+ \"-DTEXT': No closing quotation",
    "{dir}/no-program": r"no-program .*expected a program, got one that does not run: \[Errno 8\] Exec format error",
    "{dir}/broken": r"the C\+\+ compiler .*/broken --flag failed with status 3:\nno room on device\nnor patience",
    "{dir}/latin1": "the C\\+\\+ compiler .*/latin1 failed with status 1:\nw\ufffdhrend",
    "{dir}/killed": r"the C\+\+ compiler .*/killed failed with status -9:\n",
    "true": r"the C\+\+ compiler .*/true left no host\.o, and printed:\n",
    "g++ -fno-such-flag": r"failed with status 1:(.|\n)*-fno-such-flag",
}


@pytest.mark.scorecard(26)
@pytest.mark.parametrize("cxx", REFUSED, ids=lambda cxx: cxx.replace("{dir}/", ""))
def test_a_compiler_that_does_not_work_is_named_with_its_words(program, tmp_path, monkeypatch, figure, cxx):
    program("not-executable", "exit 0", mode=0o644)
    program("no-program", b"\x00\x01\x02 no program at all")
    program("broken", "echo no room on device; echo nor patience >&2; exit 3")
    program("latin1", "printf 'w\\344hrend\\n'; exit 1")
    program("killed", "kill -9 $$")
    monkeypatch.setenv("CXX", cxx.format(dir=tmp_path) + (" --flag" if "broken" in cxx else ""))
    with pytest.raises(RuntimeError, match=REFUSED[cxx]):
        compile_host(tmp_path / "built")
    figure("compilers", 1)


def test_a_compiler_that_ctrl_c_has_ended_is_an_interrupt(program, tmp_path, monkeypatch, request):
    """The terminal gives it to all of its programs; this process may come to it last.

    What a process ignores, its programs ignore too, and a shell's background processes ignore Ctrl-C: so not here.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setenv("CXX", str(program("interrupted", f"kill -{signal.SIGINT:d} $$")))
    with pytest.raises(KeyboardInterrupt):
        compile_host(tmp_path / "built")


def test_another_command_is_another_cache_key(program, tmp_path, monkeypatch):
    """Its words, and each program among them: as it was, and with another time."""
    launcher = program("ccache", 'exec "$@"')
    keys = []
    for cxx in ("g++", "g++ -m64", "g++ -m64 -pipe", f"{launcher} g++", f"{launcher} {REAL}", REAL):
        monkeypatch.setenv("CXX", cxx)
        keys.append(str(dependencies.tools({"kind": "llvm"})))
        assert str(dependencies.tools({"kind": "llvm"})) == keys[-1]
    monkeypatch.setenv("CXX", f"{launcher} g++")
    os.utime(launcher, (0, 0))
    keys.append(str(dependencies.tools({"kind": "llvm"})))
    assert len(set(keys)) == 7
    monkeypatch.delenv("CXX")
    unset = dependencies.tools({"kind": "llvm"})
    monkeypatch.setenv("CXX", " ")
    assert dependencies.tools({"kind": "llvm"}) == unset


def test_what_the_compiler_writes_of_its_own_is_in_the_directory_of_the_build(program, tmp_path, monkeypatch):
    """Not in a TMPDIR that cannot be written, and not left there when it is killed."""
    monkeypatch.setenv("TMPDIR", "/dev/null/nowhere")
    monkeypatch.setenv("CXX", str(program("shows", 'echo "$TMPDIR" >&2; exec g++ "$@"')))
    with native.compiling_host(HOST, tmp_path) as compiling:
        printed = commands.finish(compiling, "the compiler", tmp_path / "host.o")
    assert printed == f"{tmp_path}\n"


@pytest.mark.scorecard(26)
def test_nvcc_is_taken_in_the_same_way(program, tmp_path, monkeypatch, figure):
    monkeypatch.setattr(cuda_build, "tool", lambda name: f"/found/{name}")
    launcher, nvcc = program("ccache", 'exec "$@"'), program("my-nvcc", "exit 0")
    program("nvdisasm", "exit 0")
    cases = {
        None: ["/found/nvcc"],
        " ": ["/found/nvcc"],
        "nvcc": ["/found/nvcc"],
        f"{nvcc} -ccbin g++-12": [str(nvcc), "-ccbin", "g++-12"],
        f"{launcher} '{nvcc}'": [str(launcher), str(nvcc)],
    }
    for given, expected in cases.items():
        if given is None:
            monkeypatch.delenv("NVCC", raising=False)
        else:
            monkeypatch.setenv("NVCC", given)
        assert cuda_build.nvcc() == expected
    assert cuda_build.find_tool("nvdisasm") == str(tmp_path / "nvdisasm")  # the one beside it
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    with pytest.raises(RuntimeError, match=r"^NVCC: expected NVIDIA's compiler, got 'no-such-nvcc', which is not on"):
        cuda_build.nvcc()
    figure("compilers", len(cases) + 1)


def test_nvcc_that_is_broken_is_named_with_its_words(program, tmp_path, monkeypatch):
    monkeypatch.setenv("NVCC", str(program("nvcc", "printf 'kein Ger\\344t\\n' >&2; exit 2")))
    with pytest.raises(RuntimeError, match="nvcc failed with status 2:\nkein Ger\ufffdt"):
        cuda_build.assemble("", "sm_90", tmp_path)
