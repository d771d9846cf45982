"""The package as it may lie on sys.path: a checkout that is not installed, a zip, byte code alone, an odd folder."""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tvm_ffi

from pa_compiler import PagedAttentionSpec

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")
CHECKOUT = Path(__file__).parent.parent

USE = """
import sys
import numpy as np
import pa_compiler
spec = pa_compiler.PagedAttentionSpec(3, 1, 4, 2, "float32")
where, what, library = sys.argv[1:]
assert pa_compiler.__file__.startswith(where), pa_compiler.__file__
values = np.arange(8, dtype="f4").reshape(1, 2, 1, 4)
arguments = np.ones((1, 3, 4), "f4"), values, values, np.zeros((1, 1), "i4"), np.ones(1, "i4")

def fails(compile):
    try:
        compile()
    except ImportError as error:
        return str(error)
    raise AssertionError("it was compiled")

assert (pa_compiler.load(library).decode(*arguments) == values[0, 0]).all()
if what == "compile":
    assert (pa_compiler.compile(spec).decode(*arguments) == values[0, 0]).all()
    sys.exit()
from pa_compiler import compiler, generate
said = {
    fails(lambda: pa_compiler.compile(spec)),
    fails(lambda: pa_compiler.compile(spec, "cuda", cache=False)),
    fails(lambda: compiler.emit(spec)),
    fails(lambda: compiler.explain(spec)),
    fails(lambda: compiler.explain(spec, "cuda")),
    fails(generate.emit),
}
assert len(said) == 1, said
assert "tvm" not in sys.modules
print(said.pop())
"""


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "pa.so"
    compiled(SPEC).save(path)
    return path


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A folder with all that is installed but this package."""
    folder = tmp_path_factory.mktemp("others")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for each in Path(path).iterdir():
            if not each.name.startswith(("pa_compiler", "__editable__")) and each.suffix != ".pth":
                (folder / each.name).symlink_to(each)
    return folder


def use(library, *path, what):
    """What a process prints that has these folders on its path, and no others but the standard library's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", USE, str(path[0]), what, str(library)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def copy(folder):
    """The package in a folder, as the wheel has it, with its metadata."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("pa_compiler", "pa_compiler.schedules", "pa_compiler.templates"):
        place = folder / package.replace(".", "/")
        shutil.copytree(importlib.resources.files(package), place, ignore=ignored, dirs_exist_ok=True)
    about = folder / "pa_compiler-0.1.0.dist-info" / "METADATA"
    about.parent.mkdir()
    version = importlib.metadata.version("pa-compiler")
    about.write_text(f"Metadata-Version: 2.1\nName: pa-compiler\nVersion: {version}\n")
    return folder


@pytest.mark.scorecard(26)
def test_a_checkout_that_is_not_installed_says_so(library, others, figure):
    """It loads libraries."""
    said = use(library, CHECKOUT, others, what="fail")
    assert said == (
        f"pa_compiler: expected an installed package, got {CHECKOUT}/pa_compiler without pa_compiler.schedules; to "
        f"install it: python -m pip install {CHECKOUT}"
    )
    figure("installations", 1)


@pytest.mark.scorecard(26)
def test_a_copy_without_metadata_says_so(library, others, tmp_path, figure):
    shutil.rmtree(copy(tmp_path) / "pa_compiler-0.1.0.dist-info")
    said = use(library, tmp_path, others, what="fail")
    assert said.startswith(f"pa_compiler: expected an installed package, got {tmp_path}/pa_compiler without its meta")
    figure("installations", 1)


@pytest.mark.scorecard(26)
def test_byte_code_alone_loads_and_says_what_compiling_needs(library, others, tmp_path, figure):
    assert compileall.compile_dir(copy(tmp_path), quiet=1, legacy=True)
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    said = use(library, tmp_path, others, what="fail")
    assert said.startswith("pa_compiler.kernels: expected the source that is compiled, got byte code alone in ")
    figure("installations", 1)


@pytest.mark.scorecard(26)
def test_a_zip_compiles(library, others, tmp_path, own_cache, figure):
    copy(tmp_path / "unpacked")
    archive = tmp_path / "pa_compiler-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as written:
        for path in (tmp_path / "unpacked").rglob("*"):
            written.write(path, path.relative_to(tmp_path / "unpacked"))
    use(library, archive, others, what="compile")
    assert list(own_cache.glob("*/pa.so"))
    figure("installations", 1)


@pytest.mark.scorecard(26)
def test_an_installation_in_an_odd_folder_compiles(library, others, tmp_path, own_cache, figure):
    """And tvm-ffi there too, of which the C++ compiler reads headers and the linker the library."""
    folder = copy(tmp_path / 'it\'s "odd", 100%s\nä $(x) \\n')
    (folder / "tvm_ffi").symlink_to(Path(tvm_ffi.__file__).parent)
    use(library, folder, others, what="compile")
    figure("installations", 1)
