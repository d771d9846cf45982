"""Modules for the layers of vLLM: from the folder that PA_MODULES names, from the cache, or compiled."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

import pa_compiler
from pa_compiler.integrations import modules
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec

VARIABLE = "PA_MODULES"
"""The folder of libraries that were built elsewhere, by Module.save or pa-compiler build: its files NAME.so."""


def module_of(spec: PagedAttentionSpec) -> Module | str:
    """The module of a spec, or why there is none. A line on stderr says that one is compiled.

    Raises:
        FileNotFoundError: PA_MODULES names no folder.
        RuntimeError: a library in it cannot be loaded here.
        ValueError: one of them has no attend.
    """
    load_folder(os.environ.get(VARIABLE, ""))
    try:
        return _module(spec)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"{error}; to build it for {VARIABLE}: {build_command(spec)}"


@modules.remembered(torch.get_num_threads)
def _module(spec: PagedAttentionSpec) -> Module:
    return modules.of(spec)


@functools.cache
def load_folder(folder: str) -> None:
    """Take the libraries of a folder for their specs, once. Their calls use at most the threads that vLLM has bound."""
    if not folder:
        return
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{VARIABLE}: expected a folder of libraries, got {folder!r}")
    found = [pa_compiler.load(path) for path in sorted(Path(folder).glob("*.so"))]
    for each in found:
        each.num_threads = min(each.num_threads, torch.get_num_threads())
    modules.keep(*found)


def build_command(spec: PagedAttentionSpec) -> str:
    """The command that builds the library of a spec without functions."""
    stated = spec.stated()
    usual = PagedAttentionSpec(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype).stated()
    # The command line's default of out_dtype is float32, that of a spec its dtype.
    needed = ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype", "out_dtype")
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in stated.items()
        if name in needed or value != usual[name]
    ]
    return " ".join(["pa-compiler build", *options, "-o NAME.so"])
