"""What a build depends on: what is built and by which text, and the programs that build it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from pa_compiler import backends, commands, installation, native
from pa_compiler.backend import NO_EXTRAS, Extras
from pa_compiler.spec import PagedAttentionSpec

_CXX_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "LD_RUN_PATH")
"""The environment variables that change what the C++ compiler makes of its arguments."""


def versions() -> dict[str, str]:
    """Of this package and of TVM's."""
    return {name: importlib.metadata.version(name) for name in ("pa-compiler", "apache-tvm", "apache-tvm-ffi")}


def inputs(
    spec: PagedAttentionSpec, config: dict[str, Any], pipeline: str, extras: Extras = NO_EXTRAS
) -> dict[str, object]:
    """All that a build depends on but the programs that it runs."""
    return {
        "spec": spec.stated(),
        "target": backends.of(config).fingerprint(config),
        "pipeline": pipeline,
        **extras._asdict(),
        "versions": versions(),
        "languages": [platform.python_version_tuple()[:2], importlib.metadata.version("jinja2")],
        "text": installation.text_digest(),
    }


def tools(config: dict[str, Any]) -> dict[str, object]:
    """The programs that a build runs, and the variables that change what they make of their arguments.

    Raises:
        RuntimeError: one of them is missing.
    """
    return {
        "compiler": commands.identity(native.cxx(backends.of(config).machine(config))),
        "environment": {name: os.environ[name] for name in _CXX_VARIABLES if name in os.environ},
        **backends.of(config).tools(),
    }
