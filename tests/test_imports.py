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

ARROWS = {
    "bounds": {"spec", "score"},
    "score_checks": {"score"},
    "spec": {"score", "score_checks", "tracing", "kv_types"},
    "kv_types": {"spec"},  # the names of types alone
    "interface": {"spec"},
    "key_ranges": {"spec"},
    "reference": {"reference_weights"},
    "reference_weights": {"score", "reference_functions"},
    "reference_functions": {"score"},
    "codes": {"kv_types"},
    "layout": {"spec", "kv_types", "codes"},
    "tiles": {"spec", "kv_types"},
    "runtime": {
        *("spec", "score", "score_checks", "interface", "key_ranges"),
        *("verification", "report"),
    },  # a module verifies itself, by what compares it with the reference, and makes a page of itself
    "verification": {
        *("spec", "interface", "layout", "reference", "reference_weights", "reference_functions", "runtime"),
        *("score", "bounds", "tracing", "key_ranges", "kv_types", "codes"),
    },
    "score": set(),
    "score_text": {"score"},
    "ranges": {"score"},
    "tracing": {"score", "score_text", "ranges"},
    **{name: set() for name in ("words", "interrupts", "installation", "tvmscript", "statements")},
    "turns": {"interrupts"},
    "commands": {"interrupts"},
    "store": {"interrupts"},
    "native": {"commands"},
    "naming": {"spec", "tiles"},
    "locations": {"backend", "statements"},
    "kernels": {"spec", "score", "ranges", "bounds", "interface", "key_ranges", "kv_types", "tiles", "tvmscript"},
    "schedules": {"tiles", "spec", "kernels", "statements", "tvmscript"},
    "host": {"spec", "bounds", "interface", "key_ranges", "tiles", "installation", "runtime", "cpu"},
    "backend": {"spec"},
    "cpu": {
        *("spec", "bounds", "interface", "tiles", "runtime", "kernels", "schedules", "host", "tvmscript"),
        *("backend", "native", "interrupts", "words", "score", "key_ranges", "naming", "locations", "statements"),
    },
    "cuda": {
        *("spec", "interface", "tiles", "runtime", "kernels", "schedules", "host", "tvmscript"),
        *("backend", "native", "interrupts", "words", "commands", "score", "bounds", "locations", "statements"),
    },
    "backends": {"backend", "cpu", "cuda"},
    "dependencies": {"spec", "backend", "backends", "commands", "installation", "native"},
    "artifact": {"spec", "backend", "dependencies", "runtime"},
    "records": {"spec", "backends", "store", "runtime"},
    "tuning": {"spec", "backends", "compiler", "records", "turns", "cpu", "runtime", "verification"},
    "compiler": {
        *("spec", "score_checks", "records", "runtime", "artifact", "backend", "backends", "dependencies", "store"),
        *("host", "native", "installation", "interrupts", "turns"),
    },
    "bundles": {
        *("spec", "key_ranges", "artifact", "backends", "compiler", "cpu", "dependencies", "host", "native", "naming"),
        *("interface", "commands", "installation", "interrupts", "turns"),
    },
    "generate": {
        *("spec", "runtime", "artifact", "backend", "backends", "compiler", "host", "installation", "interrupts"),
    },
    "prediction": {"host", "native", "interface", "runtime", "verification"},
    "report": {
        *("spec", "interface", "verification", "words", "backend", "backends", "installation"),
        *("prediction", "cli"),  # whose words are of specs and targets
    },
    "cli": {
        *("__init__", "spec", "kv_types", "bounds", "interface", "runtime", "verification", "words"),
        *("artifact", "backend", "backends", "compiler", "generate", "naming", "report", "store"),
        *("records", "tuning", "cuda"),  # the last for the names of GPUs
    },
    "integrations": {"__init__", "spec", "runtime"},  # compile() is the package's own
    "__init__": {
        "spec",
        "interface",
        "reference",
        "layout",
        "runtime",
        "verification",
        "compiler",
        "tuning",
        "bundles",
    },
    "__main__": {"runtime", "cli"},
}
"""What each room may import. A room is a folder, such as kernels, or a file beside them."""

RUNTIME = {"__init__", "__main__"}
"""What a program that runs libraries imports, and with it all that these import but for what compiles."""
COMPILER = {"compiler", "tuning", "bundles.bundle", "cli.main", "report.making"}
BASE_PACKAGES = {"pa_compiler", "tvm_ffi", "numpy", "ml_dtypes"}
OTHERS = {
    "runtime.torch_tensors": {"torch"},  # of callers with its tensors
    "runtime.cuda_module": {"torch"},
    "verification.on_gpu": {"torch"},
    "reference_functions": {"torch"},  # of functions that call it
}
"""By the file that imports it, inside a function that not all programs call."""


def part_of(name):
    """The room that a module belongs to: the first name below pa_compiler's."""
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


def modules():
    """Every file of the package, by its name below pa_compiler's, with the others that it imports."""
    files = {name.partition(".")[2].removesuffix(".__init__"): path for name, path in python_files().items()}
    files["__init__"] = files.pop("__init__")
    return {name: (path, imported_files(path, files)) for name, path in files.items()}


def imported_files(path, files):
    """Files of the package among what a file imports."""
    for name in set(imported_names(ast.parse(path.read_text()))):
        package, _, inside = name.partition(".")
        if package == "pa_compiler":
            while inside and inside not in files:
                inside = inside.rpartition(".")[0]
            yield inside or "__init__"


def runtime_files():
    """The files that a program which runs libraries may import."""
    graph = {name: set(imported) for name, (_, imported) in modules().items()}
    found, waiting = set(), set(RUNTIME)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= graph[name] - found - COMPILER
    return found


@pytest.mark.parametrize(("part", "path"), sources())
def test_imports_follow_the_arrows(part, path):
    imported = set(imported_parts(ast.parse(path.read_text()))) - {part}
    assert imported <= ARROWS.get(part, set())


def questions(tree):
    """Lines that ask which target is meant: that compare with a kind of target, or with how the name of one begins."""
    for node in ast.walk(tree):
        asked = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            asked = node.args
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        values = [each.value for part in asked for each in ast.walk(part) if isinstance(each, ast.Constant)]
        if any(isinstance(value, str) and value in ("llvm", "cuda", "sm_") for value in values):
            yield node.lineno
        if isinstance(node, ast.Name | ast.Attribute | ast.FunctionDef | ast.arg):
            name = next(getattr(node, field) for field in ("id", "attr", "name", "arg") if hasattr(node, field))
            if name in ("is_cuda", "is_gpu", "is_cpu", "is_llvm"):
                yield node.lineno


MAY_ASK = {
    "backends": "the table of targets",
    "runtime.load": "a library's manifest says which class of modules it is loaded into",
    "verification.on_gpu": "torch's device, whose memory it is",
}
"""The files outside of the targets' rooms that ask which target is meant, and why."""


def test_which_target_is_asked_in_the_table_of_backends():
    asking = {name for name, (path, _) in modules().items() if list(questions(ast.parse(path.read_text())))}
    assert {name for name in asking if part_of(f"pa_compiler.{name}") not in ("cpu", "cuda")} == set(MAY_ASK)


@pytest.mark.parametrize(
    "text",
    [
        'target["kind"] == "cuda"',
        'kind in ("llvm", "rocm")',
        'name.startswith("sm_")',
        "entry.is_cuda",
        "def is_gpu(target): pass",
        'match kind:\n    case "cuda":\n        pass',
    ],
)
def test_a_question_is_noticed(text):
    assert list(questions(ast.parse(text)))
    assert not list(questions(ast.parse('BACKENDS = {"cuda": 1}\nname.startswith("{")')))


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


def test_files_have_no_cycle():
    """Whatever the rooms may import, of two files one does without the other."""
    waiting = {name: set(imported) - {name} for name, (_, imported) in modules().items()}
    waiting["verification.verify"].discard("runtime.module")
    while free := {name for name, imported in waiting.items() if not imported & waiting.keys()}:
        waiting = {name: imported for name, imported in waiting.items() if name not in free}
    assert not waiting


def test_what_runs_a_library_imports_three_packages():
    names, files = runtime_files(), modules()
    assert {"runtime.module", "verification.verify", "runtime.load", "cli.library"} <= names
    for name in sorted(names):
        path, _ = files[name]
        packages = {imported.partition(".")[0] for imported in imported_names(ast.parse(path.read_text()))}
        assert packages <= {*sys.stdlib_module_names, *BASE_PACKAGES, *OTHERS.get(name, ())}, name


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


@pytest.mark.parametrize("name", ["spec", "reference"])
def test_needs_nothing_but_numpy(name):
    """The spec and the oracle stand on their own."""
    path, _ = modules()[name]
    names = {imported.partition(".")[0] for imported in imported_names(ast.parse(path.read_text()))}
    assert names <= {
        "__future__",
        "collections",
        "dataclasses",
        "math",
        "numpy",
        "typing",
        "pa_compiler",
    }  # what of that: ARROWS
