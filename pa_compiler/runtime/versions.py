"""With which packages a library runs, and with which one is compiled: checked before anything of them can go wrong."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import sys

import tvm_ffi

RUNS_WITH = ((0, 1, 6), (0, 1, 16))
"""Of apache-tvm-ffi: the first version that libraries are tested with, and the first that they are not."""

PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""What compiles: a TVM runs with the tvm-ffi that it was built with alone, and its Python names change."""

COMPILES_WITH = {"apache-tvm": "tvm"} | {
    name: name for name in ("click", "filelock", "jinja2", "platformdirs", "pygments", "rich")
}
"""The packages of the extra `compiler` that a library does not need to run, and what is imported of each."""

INSTALL = "pip install 'pa-compiler[compiler]'"


@functools.cache
def check_runtime() -> None:
    """Check that libraries run with the tvm-ffi that is imported.

    Raises:
        RuntimeError: it is of a version that they are not tested with.
    """
    release = tuple(map(int, re.findall(r"\d+", tvm_ffi.__version__)[:3]))
    if not RUNS_WITH[0] <= release < RUNS_WITH[1]:
        raise RuntimeError(
            f"apache-tvm-ffi: expected a version {runs_with()}, with which libraries are tested, got "
            f"{tvm_ffi.__version__}: pip install 'apache-tvm-ffi{runs_with()}'"
        )


def runs_with() -> str:
    """RUNS_WITH as pip takes it."""
    first, end = (".".join(map(str, release)) for release in RUNS_WITH)
    return f">={first},<{end}"


@functools.cache
def check_compiler() -> None:
    """Check that the packages of the extra `compiler` are here, and TVM and tvm-ffi of the versions that it names.

    To be called before anything of TVM is imported: one that meets another tvm-ffi ends the process.

    Raises:
        ImportError: packages are missing. They are named, with the command that installs them.
        RuntimeError: TVM or tvm-ffi is of another version. Both versions are named.
    """
    if names := absent():
        raise ImportError(
            f"compiling needs packages that are not here, {', '.join(names)}: {INSTALL}", name=COMPILES_WITH[names[0]]
        )
    found = {"apache-tvm": _version_of_tvm(), "apache-tvm-ffi": tvm_ffi.__version__}
    wrong = [
        f"{name}: expected version {version}, got {found[name]}"
        for name, version in PINNED.items()
        if found[name] != version
    ]
    if wrong:
        raise RuntimeError(f"{'; '.join(wrong)}. No others compile, since these two fit each other alone: {INSTALL}")


def absent() -> list[str]:
    """The packages that compiling needs and that are not installed."""
    return [name for name, module in COMPILES_WITH.items() if importlib.util.find_spec(module) is None]


def _version_of_tvm() -> str:
    """That of the TVM that is imported, or of the one that would be."""
    try:
        return getattr(sys.modules.get("tvm"), "__version__", None) or importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return "one that says no version"
