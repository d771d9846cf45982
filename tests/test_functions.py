"""Functions of real numbers in kernels: over all numbers of float32, and in vectors on every CPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from pa_compiler import backends
from pa_compiler import tvmscript as script
from pa_compiler.cpu import build, target
from pa_compiler.kernels import functions

COUNT, LANES = 1 << 22, 16
SMALLEST_NORMAL, SMALLEST = 2.0**-126, 2.0**-149


def sigmoid(x):
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


REFERENCES = {"exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "sigmoid": sigmoid, "floor": np.floor}
BOUNDS = {"exp": 2e-7, "log": 2e-7, "sqrt": 2.0**-24, "tanh": 5e-7, "sigmoid": 4e-7, "floor": 0.0}
"""On the relative error, as the functions say of themselves."""


def compile_for(name, cpu):
    function = getattr(functions, name)

    @script.prim_func(s_tir=True)
    def evaluate(x_handle: T.handle, y_handle: T.handle):
        x = T.match_buffer(x_handle, (COUNT,), "float32")
        y = T.match_buffer(y_handle, (COUNT,), "float32")
        for i, lane in T.grid(COUNT // LANES, LANES):
            with T.sblock("function"):
                vi = T.axis.spatial(COUNT, i * LANES + lane)
                y[vi] = function(x[vi])

    sch = tvm.s_tir.Schedule(tvm.IRModule({"evaluate": evaluate}))
    sch.work_on("evaluate")
    sch.vectorize(sch.get_loops("function")[-1])
    return build.translate(sch.mod, cpu)


@pytest.fixture(scope="module")
def evaluated():
    """evaluated(name, x) -> what a function makes of COUNT numbers, on this CPU."""
    cpu, kept = target.resolve(backends.normalize("llvm")), {}

    def evaluate(name, x):
        if name not in kept:
            kept[name] = compile_for(name, cpu)
        y = tvm.runtime.tensor(np.empty_like(x))
        kept[name]["evaluate"](tvm.runtime.tensor(x), y)
        return y.numpy()

    return evaluate


def assert_close(name, x, y):
    """NaN where the function is not defined; infinities, zeros and subnormal numbers as they should be."""
    with np.errstate(all="ignore"):
        exact = REFERENCES[name](x.astype(np.float64))
        nearest = exact.astype(np.float32)
        error = np.abs(y - exact)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
    finite = np.isfinite(nearest) & np.isfinite(y)
    np.testing.assert_array_equal(y[~finite], nearest[~finite])
    error, magnitude = error[finite], np.abs(exact[finite])
    bound = np.where(magnitude < SMALLEST_NORMAL, SMALLEST, 0.0) + BOUNDS[name] * magnitude
    wrong = np.flatnonzero(error > bound)
    assert not wrong.size, f"{name}({x[finite][wrong[0]]!r}) = {y[finite][wrong[0]]!r}"


def edges():
    """Numbers around all that is special, of both signs."""
    centres = [0, 0x00800000, 0x33800000, 0x3F000000, 0x3F3504F3, 0x3F800000, 0x41100000, 0x42B17218, 0x42CFF1B5]
    centres += [0x4B000000, 0x4F000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]
    near = np.add.outer(np.array(centres, np.int64), np.arange(-256, 257)).ravel() % (1 << 31)
    return np.concatenate([near, near + (1 << 31)])


@pytest.mark.parametrize("name", REFERENCES)
def test_of_numbers_between_all_ends(evaluated, name):
    of_edges = edges()
    spread = np.linspace(0, (1 << 32) - 1, COUNT - len(of_edges)).astype(np.int64)
    x = np.concatenate([spread, of_edges]).astype(np.uint32).view(np.float32)
    assert_close(name, x, evaluated(name, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_of_every_number(evaluated, name):
    for first in range(0, 1 << 32, COUNT):
        x = np.arange(first, first + COUNT, dtype=np.uint64).astype(np.uint32).view(np.float32)
        assert_close(name, x, evaluated(name, x))


@pytest.mark.parametrize("mcpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("name", REFERENCES)
def test_no_lane_is_alone(name, mcpu):
    """No call of libm, and no arithmetic of single numbers."""
    asm = compile_for(name, target.resolve({"kind": "llvm", "mcpu": mcpu})).mod.inspect_source("asm")
    assert not re.findall(rf"call\S*\s+{name}", asm)
    assert not re.findall(r"^\s+v?(?:mul|add|sub|div|sqrt|round)s[sd]\s", asm, re.MULTILINE)
    assert re.findall(r"^\s+v?(?:mul|add|sub|div|sqrt)ps\s", asm, re.MULTILINE)
