"""Imports follow the arrows of DESIGN.md and never point back."""

from __future__ import annotations

import ast
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest
from package import python_files

# Each part may import the parts named here, and no others. A folder, such as kernels and schedules, is one part.
ARROWS = {
    "spec": set(),
    "interface": set(),
    "reference": set(),
    "layout": {"spec"},
    "versions": set(),
    "text": {"spec"},
    "cuda_target": set(),
    "target": {"cuda_target", "versions"},
    "files": set(),
    "interrupts": set(),
    "installation": set(),
    "commands": {"interrupts"},
    "cache": {"interrupts"},
    "tolerances": {"spec", "reference"},
    "tiling": {"spec", "target"},
    "gpus": {"cuda_target"},
    "cuda_tiling": {"spec", "tiling", "gpus"},
    "kernels": {"spec", "interface", "tiling", "cuda_tiling"},
    "schedules": {"tiling", "cuda_tiling", "kernels"},
    "instructions": {"target", "kernels"},
    "host": {"spec", "interface", "target", "tiling", "installation"},
    "build": {"target", "instructions", "commands", "interrupts"},
    "cuda_build": {"commands"},
    "cuda_host": {
        *("spec", "interface", "cuda_target", "tiling", "cuda_tiling", "kernels", "host", "cuda_build"),
    },
    "cuda_compiler": {
        *("spec", "versions", "cuda_target", "cuda_tiling", "kernels", "schedules", "build", "cuda_build", "cuda_host"),
        *("commands", "interrupts"),
    },
    "torch_tensors": set(),
    "dlpack": {"torch_tensors"},
    "arguments": {"dlpack", "torch_tensors"},
    "memory": {"arguments"},
    "entry_points": {"spec", "arguments", "dlpack", "torch_tensors"},
    "threads": {"interface", "arguments"},
    "manifest": {"spec", "target"},
    "loader": {"versions", "manifest"},
    "draws": {"spec", "tiling"},
    "verify": {"spec", "arguments", "layout", "reference", "tolerances", "draws"},
    "module": {
        *("spec", "interface", "arguments", "dlpack", "torch_tensors", "entry_points", "files", "memory", "threads"),
        *("manifest", "loader", "verify"),
    },
    "cuda_verify": {"arguments"},
    "cuda_module": {"interface", "arguments", "torch_tensors", "module", "verify", "cuda_verify"},
    "modules": {"manifest", "loader", "module", "cuda_module"},
    "turns": {"interrupts"},
    "dependencies": {"spec", "target", "build", "commands", "cuda_compiler", "installation"},
    "compiler": {
        *("spec", "versions", "target", "tiling", "kernels", "schedules", "host", "build"),
        *("cuda_target", "cuda_tiling", "cuda_compiler"),
        *("manifest", "loader", "module", "modules", "cache"),
        *("dependencies", "files", "installation", "interrupts", "turns"),
    },
    "cases": {"spec", "reference", "tolerances"},
    "__init__": {"spec", "interface", "reference", "layout", "module", "cuda_module", "modules", "compiler"},
    "generate": {
        *("spec", "cuda_target", "cuda_compiler", "compiler", "host", "files", "installation", "interrupts", "turns"),
    },
    "report": {"text", "interface", "cases", "tolerances", "module"},
    "assembly": set(),
    "explain": {"spec", "text", "target", "tiling", "threads", "compiler", "assembly", "cases", "report", "interrupts"},
    "cuda_explain": {
        *("spec", "text", "target", "cuda_target", "cuda_tiling", "cuda_build", "cuda_compiler", "gpus", "cases"),
        *("report", "installation", "interrupts", "turns"),
    },
    "options": {"spec", "target", "compiler", "cases"},
    "library_cli": {"text", "versions", "manifest", "module", "modules", "verify"},
    "cli": {
        *("__init__", "spec", "cases", "cache", "compiler", "generate", "report", "explain", "cuda_explain", "gpus"),
        *("options", "module", "library_cli"),
    },
    "__main__": {"versions", "library_cli", "cli"},
}

RUNTIME = {"__init__", "__main__"}
"""What a program that runs libraries imports, and with it all that these import but for what compiles."""
COMPILER = {"compiler", "cli"}
BASE_PACKAGES = {"pa_compiler", "tvm_ffi", "numpy", "ml_dtypes"}
OTHERS = {
    "torch_tensors": {"torch"},  # of callers with its tensors
    "cuda_module": {"torch"},
    "cuda_verify": {"torch"},
    "target": {"tvm"},  # in resolve, for the compiler
}
"""By the part that imports it, inside a function that not all programs call."""


def part_of(name):
    """The part that a module belongs to: the first name below pa_compiler's."""
    return name.split(".")[1]


def sources():
    """(part, path) of every Python file of the package."""
    return [pytest.param(part_of(name), path, id=name) for name, path in python_files().items()]


def imported_names(tree):
    """What a file imports anywhere in it, inside functions and for type checks too, with the names inside of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(tree):
    """Parts of pa_compiler among them."""
    for name in imported_names(tree):
        package, _, part = name.partition(".")
        if package == "pa_compiler":
            yield part.partition(".")[0] or "__init__"


def runtime_parts():
    """The parts that a program which runs libraries may import."""
    found, waiting = set(), set(RUNTIME)
    while waiting:
        part = waiting.pop()
        found.add(part)
        waiting |= set(imported_parts(parsed(part))) - found - COMPILER
    return found


def parsed(part):
    return ast.parse(importlib.resources.files("pa_compiler").joinpath(f"{part}.py").read_text())


@pytest.mark.parametrize(("part", "path"), sources())
def test_imports_follow_the_arrows(part, path):
    imported = set(imported_parts(ast.parse(path.read_text()))) - {part}
    assert imported <= ARROWS.get(part, set())


def test_files_are_found_in_folders_of_any_depth(tmp_path, monkeypatch):
    """Those of the tests that read the package's text: a new folder must not hide what is in it."""
    (tmp_path / "made_up" / "kernels" / "deeper").mkdir(parents=True)
    for file in ("__init__.py", "spec.py", "kernels/qk.py", "kernels/deeper/sums.py", "kernels/notes.txt"):
        (tmp_path / "made_up" / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = sorted(python_files(["made_up"]))
    assert names == ["made_up.__init__", "made_up.kernels.deeper.sums", "made_up.kernels.qk", "made_up.spec"]
    assert [part_of(name) for name in names] == ["__init__", "kernels", "kernels", "spec"]


def test_every_folder_of_the_package_is_installed():
    """An editable install finds what pyproject.toml forgets; a wheel would lack it."""
    setuptools = (Path(__file__).parent.parent / "pyproject.toml").read_text().partition("[tool.setuptools]")[2]
    packages = re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", setuptools, re.DOTALL | re.MULTILINE)[1])
    assert {name.rpartition(".")[0] for name in python_files()} == set(packages)
    patterns = re.search(r'^"pa_compiler\.templates" = \[(.*?)\]', setuptools, re.DOTALL | re.MULTILINE)[1]
    folder = Path(str(importlib.resources.files("pa_compiler.templates")))
    installed = {path for pattern in re.findall(r'"(.*?)"', patterns) for path in folder.glob(pattern)}
    assert {path for path in folder.rglob("*.*") if path.suffix not in (".py", ".pyc")} == installed


def test_the_arrows_have_no_cycle():
    order = list(ARROWS)
    for part, imported in ARROWS.items():
        assert all(order.index(name) < order.index(part) for name in imported), part


def test_what_runs_a_library_imports_three_packages():
    parts = runtime_parts()
    assert {"module", "verify", "modules", "library_cli"} <= parts
    for part in sorted(parts):
        names = {name.partition(".")[0] for name in imported_names(parsed(part))}
        assert names <= {*sys.stdlib_module_names, *BASE_PACKAGES, *OTHERS.get(part, ())}, part


@pytest.mark.parametrize(
    "module", ["pa_compiler", "pa_compiler.verification.cases", "pa_compiler.cli", "pa_compiler.store"]
)
def test_importing_does_not_import_tvm(module):
    code = f"import sys, {module}; assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_compile_is_a_public_name_that_is_imported_when_it_is_asked_for():
    code = """
import sys
import pa_compiler
assert "compile" in dir(pa_compiler) and "pa_compiler.compiler" not in sys.modules
from pa_compiler import *
assert compile is pa_compiler.compile is sys.modules["pa_compiler.compiler"].compile
assert "tvm" not in sys.modules and not hasattr(pa_compiler, "compiles")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("part", ["spec", "reference"])
def test_needs_nothing_but_numpy(part):
    """The spec and the oracle stand on their own."""
    names = {name.partition(".")[0] for name in imported_names(parsed(part))}
    assert names <= {"__future__", "dataclasses", "math", "numpy"}
