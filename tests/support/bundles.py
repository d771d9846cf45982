"""Bundles that tests share, and programs that are linked to them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
from pathlib import Path

from c_calls import Kernels, Library
from refusals import SPEC
from specs import BASE
from specs import SPECS as SHARED

import pa_compiler
from pa_compiler import naming

C = Path(__file__).parents[1] / "c"
GCC = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"]


def tilted(score, batch, head, query_pos, key_pos, tilt):
    return score + tilt[head, batch] * 0.01 * (key_pos - query_pos)


SPECS = {  # every layout, type and kind of argument
    "float32": BASE,
    "float16": SPEC,
    "bfloat16_packed": SHARED["bfloat16_packed"],
    "scored": dataclasses.replace(BASE, window=100, softcap=5.0, alibi=True, sinks=True),
    "codes_and_a_function": dataclasses.replace(
        BASE, kv_dtype="int8", score_mod=tilted, inputs={"tilt": ("float32", (6, "batch"))}
    ),
    "int4": dataclasses.replace(BASE, head_dim=32, kv_dtype="int4"),
}
TARGETS = ["x86-64-v3", "llvm"]
OTHER_TARGETS = ["x86-64", "sapphirerapids"]
MODULE_TARGETS = [{"kind": "llvm", "mcpu": "x86-64-v3"}, "llvm"]
"""As compile takes TARGETS."""


def built(folder, specs, targets):
    """The folder of a bundle, which one process of several builds."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            pa_compiler.bundle(specs, targets, folder)
    return folder


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def target_names(folder):
    """Names of a bundle's targets, by the place of the spec's: those of TARGETS."""
    made = {each["target"]["mcpu"]: each["name"] for each in manifest(folder)["targets"]}
    assert "x86-64-v3" in made
    return ["x86-64-v3", next((name for name in made.values() if name != "x86-64-v3"), "x86-64-v3")]


_LOADED = {}


def kernels(folder, isa, name, monkeypatch, **options):
    """The kernels of a spec for a target of a bundle, as Kernels: each is loaded as a library of its own."""
    key = (folder, isa)
    if key not in _LOADED:
        monkeypatch.setenv("PA_ISA", isa)
        copy = folder.with_name(f"{folder.name}.{isa}.{os.getpid()}")
        (copy / "lib").mkdir(parents=True)
        (copy / "lib" / "libpa.so").write_bytes((folder / "lib" / "libpa.so").read_bytes())
        _LOADED[key] = Library(copy)
        assert _LOADED[key].isa == isa.encode()
    spec = SPECS[name]
    return Kernels(_LOADED[key], naming.spec_name(spec), spec, **{"num_threads": 2, **options})


def program(folder, source, made, *flags, static=False):
    """Compile a program and link it to a bundle."""
    libraries = [folder / "lib" / "libpa.a"] if static else [f"-L{folder / 'lib'}", "-lpa"]
    libraries += ["-lm", "-pthread", f"-Wl,-rpath,{folder / 'lib'}"]
    command = [*GCC, *flags, source, f"-I{folder / 'include'}", *libraries, "-o", made]
    subprocess.run([str(word) for word in command], check=True)
    return made
