"""Modules hand their arguments over in the order of the list that the libraries are made with."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy as np
import pytest
from inputs import DTYPES, make_inputs
from specs import BASE, DTYPE_SPECS

from pa_compiler import PagedAttentionSpec, host, installation
from pa_compiler.interface import CHECKS, CPU_ENTRY_POINTS, CUDA_ENTRY_POINTS, THREADING

DECODE = ("query", "key_cache", "value_cache", "block_table", "context_lens")


class Recorder:
    """Stands for the function of a library; keeps what it is given."""

    def __call__(self, *given):
        self.given = given


@pytest.fixture
def recorded():
    """recorded(module, "decode") -> a copy of it whose entry point is a Recorder, and that."""

    def replace(module, name):
        changed, recorder = copy.copy(module), Recorder()
        getattr(changed, f"_{name}")._function = recorder
        return changed, recorder

    return replace


def by_name(parameters, recorder):
    return dict(zip((parameter.name for parameter in parameters), recorder.given, strict=True))


def append_arrays(spec):
    cache = np.zeros((3, *spec.key_cache_shape[1:]), DTYPES[spec.dtype])
    new = np.zeros((2, spec.num_kv_heads, spec.head_dim), DTYPES[spec.dtype])
    arrays = {"key": new, "value": new.copy(), "key_cache": cache, "value_cache": cache.copy()}
    return arrays | {"slot_mapping": np.zeros(2, np.int64)}


@pytest.mark.parametrize("name", ["decode", "append_kv"])
def test_a_cpus_arguments(compiled, recorded, name):
    module, recorder = recorded(compiled(BASE), name)
    module.num_threads, module.threading = 3, "openmp"
    inputs = make_inputs(BASE, [3, 5])
    arrays = dict(zip(DECODE, inputs.arguments, strict=True)) | {"out": inputs.out, "lse": inputs.lse}
    numbers = {"scale": 0.25}
    if name == "append_kv":
        arrays, numbers = append_arrays(BASE), {}
    getattr(module, name)(**arrays, **numbers)
    given = by_name(CPU_ENTRY_POINTS[name], recorder)
    assert all(given[each] is array for each, array in arrays.items())
    assert (
        given.items() >= {**numbers, "num_threads": 3, "threading": THREADING.index("openmp"), "as_uint16": 0}.items()
    )
    assert given["cpus"] == module._functions["cpu_set"](np.array(sorted(module.cpus), np.int32))


def test_arguments_of_some_specs(compiled, recorded):
    """In their places where the spec has them; None where it has not and none are given."""
    arrays = dict(zip(DECODE, make_inputs(BASE, [3, 5]).arguments, strict=True))
    heads = {"alibi_slopes": np.zeros(6, np.float32), "sinks": np.ones(6, np.float32)}
    for spec, more in ((BASE, {}), (dataclasses.replace(BASE, alibi=True, sinks=True), heads)):
        module, recorder = recorded(compiled(spec), "decode")
        module.decode(**arrays, **more)
        given = by_name(CPU_ENTRY_POINTS["decode"], recorder)
        assert all(given[each] is more.get(each) for each in heads)


@pytest.mark.parametrize("name", ["decode", "append_kv"])
def test_a_gpus_arguments(gpu_module, recorded, name):
    spec = PagedAttentionSpec(8, 2, 64, 16, "bfloat16")
    module, recorder = recorded(gpu_module(spec), name)
    inputs = make_inputs(spec, [3, 5])
    arrays = dict(zip(DECODE, inputs.arguments, strict=True)) | {"out": inputs.out, "lse": inputs.lse}
    arrays = arrays if name == "decode" else append_arrays(spec)
    getattr(module, name)(**arrays, check="none")
    given = by_name(CUDA_ENTRY_POINTS[name], recorder)
    assert given["check"] == CHECKS.index("none")
    for each, array in arrays.items():
        assert np.shares_memory(given[each], array)
        assert given[each].dtype == (np.uint16 if array.dtype == DTYPES["bfloat16"] else array.dtype)


@pytest.mark.parametrize("name", ["decode", "append_kv"])
def test_the_bits_of_as_uint16_are_positions(compiled, recorded, name):
    spec = DTYPE_SPECS["bfloat16"]
    module, recorder = recorded(compiled(spec), name)
    inputs = make_inputs(spec, [3, 5])
    arrays = dict(zip(DECODE, inputs.arguments, strict=True)) | {"out": inputs.out, "lse": inputs.lse}
    arrays = arrays if name == "decode" else append_arrays(spec)
    getattr(module, name)(**arrays)
    bits = by_name(CPU_ENTRY_POINTS[name], recorder)["as_uint16"]
    parameters = [parameter.name for parameter in CPU_ENTRY_POINTS[name]]
    held = [each for each in arrays if arrays[each].dtype == DTYPES["bfloat16"]]
    assert {each for position, each in enumerate(parameters) if bits >> position & 1} == set(held)


@pytest.mark.parametrize(("room", "entry_points"), [("cpu", CPU_ENTRY_POINTS), ("cuda", CUDA_ENTRY_POINTS)])
def test_the_header_has_the_same_list(room, entry_points):
    text = host.headers(f'#include "{room}/interface.h"\n')[f"{room}/interface.h"]
    lists = re.findall(r"// What (\w+) takes.*?\{(.*?)kCount = (\d+);", text, re.DOTALL)
    assert [name for name, _, _ in lists] == list(entry_points)
    for name, declared, count in lists:
        names = [parameter.said for parameter in entry_points[name]]
        assert re.findall(r'\{(\d+), "([\w\[\]]+)"\}', declared) == [(str(i), each) for i, each in enumerate(names)]
        assert int(count) == len(names)
    template = installation.templates()[f"{room}/host.cc.j2"]
    of_spec = {
        "parameters": "Decode",
        "decode_given": "Decode",
        "attend_parameters": "Attend",
        "attend_given": "Attend",
    }
    for given, parameters in (of_spec | {"shared_given": "AttendSharedPrefix"}).items():
        template = template.replace(f"{{{{ {given} }}}}", f"{parameters}Parameters")
    exported = re.findall(r"^PA_EXPORT\((\w+), pa::(\w+)Parameters", template, re.MULTILINE)
    assert [name for name, _ in exported] == list(entry_points)
    assert all(parameters.lower() == name.replace("_", "") for name, parameters in exported)
