"""Files and functions are short enough to be read at once: a longer file says why, in its first words."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE, FUNCTION, TENSORIR = 300, 50, 90
"""Lines, at most; of functions, those of their bodies without docstrings. TensorIR in a function counts by itself."""

REASON = f"more than {FILE} lines"
"""What the docstring or the first comment of a longer file has in the sentence that says why."""

FOLDERS = ("pa_compiler", "schedules", "templates", "benchmarks", "examples", "tests")
SUFFIXES = (".py", ".cc", ".h", ".cu", ".j2")


def files():
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def too_long_files():
    for path in files():
        lines = path.read_text().splitlines()
        first = " ".join(lines[:20])
        if len(lines) > FILE and REASON not in first:
            yield path.relative_to(ROOT).as_posix()


def is_tensorir(node):
    """Whether a function is read as TensorIR: a PrimFunc, or what is put into one."""
    names = {part.id for each in node.decorator_list for part in ast.walk(each) if isinstance(part, ast.Name)}
    names |= {part.attr for each in node.decorator_list for part in ast.walk(each) if isinstance(part, ast.Attribute)}
    return bool(names & {"prim_func", "inline"})


def functions_in(node):
    """The functions directly inside of a node, however deep in its statements."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child
        else:
            yield from functions_in(child)


def begin(node):
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def length(function):
    """Lines of a function's body, without its docstring and the TensorIR in it."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    first = begin(body[0]) if isinstance(body[0], ast.FunctionDef) else body[0].lineno
    inner = [each for each in functions_in(function) if is_tensorir(each)]
    return function.end_lineno - first + 1 - sum(each.end_lineno - begin(each) + 1 for each in inner)


def lengths(tree):
    """(name, lines, whether it is TensorIR) of all functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name, length(node), is_tensorir(node)


def too_long_functions():
    for path in files():
        if path.suffix == ".py" and "tests" not in path.parts:
            for name, lines, of_tensorir in lengths(ast.parse(path.read_text())):
                if lines > (TENSORIR if of_tensorir else FUNCTION):
                    yield f"{path.relative_to(ROOT).as_posix()}: {name}"


def test_files_and_functions_are_short():
    assert [*too_long_files(), *too_long_functions()] == []


def test_the_folders_are_read():
    names = {path.relative_to(ROOT).as_posix() for path in files()}
    assert names >= {"pa_compiler/cuda/kernels/fma.py", "schedules/__init__.py", "tests/support/emulator/threads.h"}
    assert {path.suffix for path in files()} == set(SUFFIXES)


@pytest.mark.parametrize(("lines", "kind"), [(50, "def made"), (90, "@T.prim_func\n    def kernel")])
def test_lines_are_counted(lines, kind):
    body = "\n".join(["        x = 1"] * lines)
    inside = f'    {kind}():\n        """Say\n        so."""\n{body}\n'
    source = f'def make():\n    """Make it."""\n    y = 2\n{inside}    return y\n'
    found = {name: (count, of_tensorir) for name, count, of_tensorir in lengths(ast.parse(source))}
    inner = kind.rpartition(" ")[2]
    assert found[inner] == (lines, inner == "kernel")
    assert found["make"][0] == (2 if inner == "kernel" else lines + 5)
