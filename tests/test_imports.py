"""Imports follow the arrows of DESIGN.md and never point back."""

from __future__ import annotations

import ast
import importlib.resources
import subprocess
import sys

import pytest

# Each part may import the parts named here, and no others. kernels and schedules are one part each.
ARROWS = {
    "spec": set(),
    "reference": set(),
    "layout": {"spec"},
    "cuda_target": set(),
    "target": {"cuda_target"},
    "files": set(),
    "interrupts": set(),
    "installation": set(),
    "commands": {"interrupts"},
    "cache": {"interrupts"},
    "tolerances": {"spec", "reference"},
    "tiling": {"spec", "target"},
    "cuda_tiling": {"spec", "tiling"},
    "kernels": {"spec", "tiling", "cuda_tiling"},
    "schedules": {"tiling", "cuda_tiling", "kernels"},
    "instructions": {"target", "kernels"},
    "host": {"spec", "target", "tiling", "installation"},
    "build": {"target", "instructions", "commands", "interrupts"},
    "cuda_build": {"commands"},
    "cuda_host": {"spec", "cuda_target", "tiling", "cuda_tiling", "kernels", "host", "cuda_build"},
    "cuda_compiler": {
        *("spec", "cuda_target", "cuda_tiling", "kernels", "schedules", "build", "cuda_build", "cuda_host"),
        *("commands", "interrupts"),
    },
    "memory": set(),
    "arguments": set(),
    "manifest": {"spec", "target"},
    "loader": {"manifest"},
    "draws": {"spec"},
    "verify": {"spec", "arguments", "layout", "reference", "tolerances", "draws"},
    "module": {"spec", "arguments", "files", "memory", "manifest", "loader", "verify"},
    "cuda_verify": {"arguments"},
    "cuda_module": {"arguments", "module", "verify", "cuda_verify"},
    "modules": {"manifest", "loader", "module", "cuda_module"},
    "turns": {"interrupts"},
    "dependencies": {"spec", "target", "build", "commands", "cuda_compiler", "installation"},
    "compiler": {
        *("spec", "target", "tiling", "kernels", "schedules", "host", "build"),
        *("cuda_target", "cuda_tiling", "cuda_compiler"),
        *("manifest", "loader", "module", "modules", "cache"),
        *("dependencies", "files", "installation", "interrupts", "turns"),
    },
    "cases": {"spec", "reference", "tolerances"},
    "__init__": {"spec", "reference", "layout", "module", "cuda_module", "modules", "compiler"},
    "generate": {
        "spec",
        "cuda_target",
        "cuda_compiler",
        "compiler",
        "host",
        "files",
        "installation",
        "interrupts",
        "turns",
    },
    "report": {"spec", "cases", "tolerances", "manifest", "module", "verify"},
    "assembly": set(),
    "explain": {"spec", "target", "tiling", "compiler", "assembly", "cases", "report", "interrupts"},
    "gpus": set(),
    "cuda_explain": {
        *("spec", "target", "cuda_target", "cuda_tiling", "cuda_build", "cuda_compiler", "gpus", "cases", "report"),
        *("installation", "interrupts", "turns"),
    },
    "options": {"spec", "target", "cases"},
    "cli": {
        *(
            "cuda_explain",
            "gpus",
            "__init__",
            "spec",
            "cases",
            "cache",
            "generate",
            "report",
            "explain",
            "options",
            "manifest",
            "module",
        ),
        "compiler",
    },
}


def sources():
    """(part, path) of every Python file of the package."""
    for package in ("pa_compiler", "pa_compiler.kernels", "pa_compiler.schedules", "pa_compiler.templates"):
        for path in importlib.resources.files(package).iterdir():
            if path.name.endswith(".py"):
                part = path.stem if package == "pa_compiler" else package.rpartition(".")[2]
                yield pytest.param(part, path, id=f"{package}.{path.stem}")


def imported_parts(tree):
    """Parts of pa_compiler that a file imports anywhere in it, inside functions and for type checks too."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, part = name.partition(".")
            if package == "pa_compiler":
                yield part.partition(".")[0] or "__init__"


@pytest.mark.parametrize(("part", "path"), list(sources()))
def test_imports_follow_the_arrows(part, path):
    imported = set(imported_parts(ast.parse(path.read_text()))) - {part}
    assert imported <= ARROWS.get(part, set())


def test_the_arrows_have_no_cycle():
    order = list(ARROWS)
    for part, imported in ARROWS.items():
        assert all(order.index(name) < order.index(part) for name in imported), part


@pytest.mark.parametrize("module", ["pa_compiler", "pa_compiler.cases", "pa_compiler.cli", "pa_compiler.cache"])
def test_importing_does_not_import_tvm(module):
    code = f"import sys, {module}; assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("part", ["spec", "reference"])
def test_needs_nothing_but_numpy(part):
    """The spec and the oracle stand on their own."""
    tree = ast.parse(importlib.resources.files("pa_compiler").joinpath(f"{part}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "dataclasses", "math", "numpy"}
