"""Processes in bare environments: no home, no name, nothing to write to, nothing that may run, no /proc.

Mounts and users are of a namespace of the process's own. Where the system gives none, the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from inputs import make_inputs
from specs import DTYPE_SPECS
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.runtime import loader

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")

NAMELESS = ("unshare", "--user", "--map-user=54321")


def in_namespace(mounts, command, env, nameless=False):
    """Run a command after the shell's commands `mounts`, by a user without a name if nameless is true."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not there: no process runs in an environment of its own")
    own = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    script = " && ".join([*mounts, 'exec "$@"'])
    words = [*own, "sh", "-c", script, "sh", *(NAMELESS if nameless else ())]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no process runs in an environment of its own here: {tried.stderr.strip()}")
    return subprocess.run([*words, *command], env=env, capture_output=True, text=True, check=False, cwd="/")


COMPILE = """
import json, sys, warnings
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pa_compiler
    spec = pa_compiler.PagedAttentionSpec(3, 1, 4, 2, "float32")
    try:
        modules = [pa_compiler.compile(spec) for _ in range(1 + ("again" in sys.argv))]
    except (OSError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        sys.exit()
query, table, lens = np.ones((1, 3, 4), "f4"), np.zeros((1, 1), "i4"), np.ones(1, "i4")
values = np.arange(8, dtype="f4").reshape(1, 2, 1, 4)
outs = [module.decode(query, values, values, table, lens) for module in modules]
assert all((out == values[0, 0]).all() for out in outs), outs
print(json.dumps({"warnings": [str(each.message) for each in caught]}))
"""

READ_ONLY = "mount -o remount,bind,ro /"
WITHOUT_CACHE = "the user's cache directory: expected one to keep libraries in, or PA_CACHE_DIR to name another"

# What the environment is, of {dir}: mounts, variables (None: not set), whether the user has no name; and what is to
# become of a compile: "" (nothing is said), what the one warning says, or how the error begins.
ENVIRONMENTS = {
    "nothing but a folder where nothing may run": (
        ["mount -t tmpfs -o noexec none {dir}", READ_ONLY],
        {"HOME": None, "TMPDIR": "{dir}"},
        True,
        WITHOUT_CACHE,
    ),
    "a read-only home": (["mount -t tmpfs -o ro none {dir}"], {"HOME": "{dir}"}, False, WITHOUT_CACHE),
    "no home and no name": ([], {"HOME": None}, True, WITHOUT_CACHE),
    "a home that is a device": ([], {"HOME": "/dev/null"}, False, WITHOUT_CACHE),
    "an empty home on a read-only system": (
        ["mount -t tmpfs none {dir}", READ_ONLY],
        {"HOME": "", "TMPDIR": "{dir}"},
        True,
        WITHOUT_CACHE,
    ),
    "a full home": (
        ["mount -t tmpfs -o size=16k none {dir}", "(cat /dev/zero > {dir}/full || true) 2>/dev/null"],
        {"HOME": "{dir}"},
        False,
        WITHOUT_CACHE,
    ),
    "a cache and no folder for temporary files": (
        ["mount -t tmpfs -o mode=700 none {dir}", READ_ONLY],
        {"HOME": None, "TMPDIR": "/nowhere", "PA_CACHE_DIR": "{dir}"},
        True,
        "",
    ),
    "a cache where nothing may run, and no home": (
        ["mount -t tmpfs -o noexec,mode=700 none {dir}"],
        {"HOME": "/dev/null", "TMPDIR": "{dir}", "PA_CACHE_DIR": "{dir}"},
        False,
        "",
    ),
    "a read-only cache": (
        ["mount -t tmpfs -o ro,mode=700 none {dir}"],
        {"PA_CACHE_DIR": "{dir}"},
        False,
        "OSError: [Errno 30] PA_CACHE_DIR: expected a directory to keep libraries in, or compile(cache=False), got:",
    ),
    "nowhere to write": (
        [READ_ONLY],
        {"HOME": "/nowhere", "TMPDIR": "/nowhere"},
        True,
        "FileNotFoundError: [Errno 2] No usable temporary directory found in",
    ),
    "no /proc": (["mount -t tmpfs none /proc"], {}, False, "RuntimeError: /proc/cpuinfo: expected what this CPU has"),
}


def compile_in(name, tmp_path, *words):
    mounts, variables, nameless, _ = ENVIRONMENTS[name]
    env = {key: value for key, value in os.environ.items() if key not in ("PA_CACHE_DIR", "XDG_CACHE_HOME")}
    for key, value in variables.items():
        env.pop(key, None)
        if value is not None:
            env[key] = value.format(dir=tmp_path)
    mounts = [each.format(dir=tmp_path) for each in mounts]
    done = in_namespace(mounts, [sys.executable, "-c", COMPILE, *words], env, nameless)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.scorecard(26)
def test_compiles_in_any_environment_or_says_what_it_needs(tmp_path, count, figure):
    """Twice in a process, with one warning."""
    names = list(ENVIRONMENTS)
    for number, name in enumerate(names if count(0, 1) else [names[0], *names[-3:]]):
        directory = tmp_path / str(number)
        directory.mkdir()
        found, expected = compile_in(name, directory, *["again"] * count(0, 1)), ENVIRONMENTS[name][-1]
        if "Error: " in expected:
            assert found.get("error", "").startswith(expected), (name, found)
        else:
            warned = [expected in text for text in found.get("warnings", ["none: it failed"])]
            assert warned == [True] * bool(expected), (name, found)
        figure("environments", 1)


LOAD = """
import os, sys, tempfile
import numpy as np
import pa_compiler
from pa_compiler.runtime import loader
library, arguments, out, *folders = sys.argv[1:]
arrays, expected = np.load(arguments), np.load(out)
before = len(os.listdir("/proc/self/fd"))
for folder in folders:
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    loader._LOADED.clear()
    assert (pa_compiler.load(library).decode(**arrays) == expected).all(), folder
    print(folder, tempfile.tempdir)
assert len(os.listdir("/proc/self/fd")) == before
assert "tvm" not in sys.modules
"""


@pytest.mark.scorecard(26)
def test_loads_whatever_the_folder_for_temporary_files_is(compiled, tmp_path, figure):
    """Nothing may run there, it is not there, read-only, full, or too small; no descriptor is left open."""
    module, inputs = compiled(SPEC), make_inputs(SPEC, [0, 1, 5])
    module.save(tmp_path / "pa.so")
    names = ("query", "key_cache", "value_cache", "block_table", "context_lens")
    np.savez(tmp_path / "arguments.npz", **dict(zip(names, inputs.arguments, strict=True)))
    np.save(tmp_path / "out.npy", module.decode(*inputs.arguments))
    options = {"noexec": "noexec", "read-only": "ro", "full": "size=4k", "small": "size=32k", "good": "rw"}
    folders = [str(tmp_path / name) for name in options] + [str(tmp_path / "missing"), "", "/dev/null"]
    for name in options:
        (tmp_path / name).mkdir()
    mounts = [f"mount -t tmpfs -o {option} none {tmp_path}/{name}" for name, option in options.items()]
    mounts += [f"(cat /dev/zero > {tmp_path}/full/file || true) 2>/dev/null"]
    files = [str(tmp_path / name) for name in ("pa.so", "arguments.npz", "out.npy")]
    for more in ([], [READ_ONLY]):  # then there is no other folder to take in place of one that cannot be written
        done = in_namespace(mounts + more, [sys.executable, "-c", LOAD, *files, *folders], dict(os.environ))
        assert (done.returncode, len(done.stdout.splitlines())) == (0, len(folders)), done.stderr
    figure("folders for temporary files", 2 * len(folders))


def descriptors():
    """How many there are, that of the listing among them."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_folder(monkeypatch):
    """There is no folder for temporary files, and nothing has been loaded."""

    def refuse(**_):
        raise FileNotFoundError("no folder")

    monkeypatch.setattr(loader, "tempfile", types.SimpleNamespace(TemporaryDirectory=refuse))
    monkeypatch.setattr(loader, "_LOADED", {})


def test_libraries_from_memory_are_told_apart(compiled, tmp_path, no_folder):
    """Each has the descriptor that the one before has given back."""
    specs = list(DTYPE_SPECS.values())
    for spec in specs:
        compiled(spec).save(tmp_path / f"{spec.dtype}.so")
    before, loaded = descriptors(), []
    for _ in range(2):
        loader._LOADED.clear()
        loaded += [pa_compiler.load(tmp_path / f"{spec.dtype}.so") for spec in specs]
    assert descriptors() == before
    for module in loaded:
        inputs = make_inputs(module.spec, [0, 1, 40])
        expected = compiled(module.spec).decode(*inputs.arguments)
        assert_same_bits(module.decode(*inputs.arguments), expected)
    with open("/proc/self/maps") as maps:
        assert "/memfd:pa.so (deleted)" in maps.read()


def test_paths_of_libraries_from_memory_lead_nowhere_afterwards(compiled, tmp_path, no_folder):
    """Where they led to another open file, a debugger would read that."""
    compiled(SPEC).save(tmp_path / "pa.so")
    pa_compiler.load(tmp_path / "pa.so")
    assert loader._PATHS
    assert not [path for path in loader._PATHS if os.path.exists(path)]


def test_a_thread_with_the_number_of_another_is_not_taken(compiled, tmp_path, no_folder, monkeypatch):
    """The system's loader would give the library that it has by that path."""
    compiled(SPEC).save(tmp_path / "pa.so")
    numbers = []

    def number():
        numbers.append(threading.get_native_id())
        if len(numbers) == 1:
            loader._PATHS.update(f"/proc/self/task/{numbers[0]}/fd/{descriptor}" for descriptor in range(1024))
        return numbers[-1]

    monkeypatch.setattr(loader, "_PATHS", set())
    monkeypatch.setattr(loader, "threading", types.SimpleNamespace(get_native_id=number))
    assert pa_compiler.load(tmp_path / "pa.so").spec == SPEC
    assert (len(numbers), len(loader._PATHS)) == (2, 1025)


def test_what_is_neither_loaded_from_a_folder_nor_from_memory_is_said(compiled, tmp_path, no_folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    compiled(SPEC).save(tmp_path / "pa.so")
    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(RuntimeError, match=r"^pa\.so: .* TMPDIR names: no folder; and from memory: .* not permitted"):
        pa_compiler.load(tmp_path / "pa.so")
