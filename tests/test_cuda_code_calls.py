"""Modules for a GPU with caches of codes, on the fake driver: hosts, checks of arguments, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import gpu_memory
import numpy as np
import pytest
from cuda_driver import OnGpu
from inputs import make_inputs
from test_cuda_errors import on_device
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.verification import on_gpu, verify

BASE = PagedAttentionSpec(8, 2, 64, 16, "bfloat16")
SPECS = {
    "int8": dataclasses.replace(BASE, kv_dtype="int8"),
    "e4m3_of_heads": dataclasses.replace(BASE, kv_layout="HND", kv_dtype="float8_e4m3fn", kv_scale="head"),
    "e5m2": PagedAttentionSpec(4, 2, 48, 5, "float32", kv_dtype="float8_e5m2"),
}
LENGTHS = [0, 1, 700, 33]

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
@pytest.mark.parametrize("check", ["host", "device", "none"])
def test_decode(gpu, gpu_module, spec, check):
    call = OnGpu(gpu, make_inputs(spec, LENGTHS))
    call.decode(gpu_module(spec), check=check)
    gpu.run()
    call.check(spec)


@every_spec
def test_verify(gpu, gpu_module, spec, count):
    """Drawn calls of decode, attend and append_kv, whose scales are compared too."""
    module = on_gpu.OnGpu(gpu_module(spec, attend=True), gpu_memory.FakeMemory(gpu))
    for number in range(count(2, 12)):
        result = verify.verify(module, seed=1, draw=number)
        assert result.passed, result.failures
        gpu.release()


# id, error, the argument at fault, the message's words, what is given in place of it
BAD = [
    ("none", TypeError, "key_scale", "expected an array, since the spec has kv_dtype, got None", lambda i: None),
    ("of_blocks", ValueError, "value_scale", "expected shape [10, 2, 16]", lambda i: on_device(i["value_scale"][1:])),
    ("dtype", TypeError, "key_scale", "expected dtype float32, got float16",
     lambda i: on_device(np.zeros(i["key_scale"].shape, np.float16))),
    ("device", ValueError, "key_scale", "on CUDA device 0, where query is, got one on device 1",
     lambda i: on_device(i["key_scale"], 1)),
    ("numpy", ValueError, "value_scale", "CUDA memory (device type 2), got device type 1", lambda i: i["value_scale"]),
]  # fmt: skip


@pytest.mark.parametrize(("error", "argument", "words", "change"), [each[1:] for each in BAD], ids=[b[0] for b in BAD])
def test_decode_refuses(gpu, gpu_module, error, argument, words, change):
    spec = SPECS["int8"]
    inputs = make_inputs(spec, [20, 0, 70])
    call = OnGpu(gpu, inputs)
    gpu.log()
    with pytest.raises(error, match=rf"^{argument}: .*{re.escape(words)}"):
        call.decode(gpu_module(spec), **{argument: change(inputs.heads)})
    gpu.run()
    assert gpu.log() == []


def test_scales_without_codes_are_refused(gpu, gpu_module):
    call = OnGpu(gpu, make_inputs(BASE, [20]))
    with pytest.raises(TypeError, match=r"^key_scale: expected None, since the spec has no kv_dtype"):
        call.decode(gpu_module(BASE), key_scale=gpu.tensor(np.ones(1, np.float32)))


def appended(gpu, module, spec, **others):
    """The tensors of an append_kv of 40 tokens to new caches."""
    rng = np.random.default_rng(0)
    new = [rng.standard_normal((40, 2, dim)).astype(make_inputs(spec, [1]).query.dtype) for dim in (64, 64)]
    inputs = make_inputs(spec, [100], poison="none")
    names = ("key_cache", "value_cache")
    tensors = dict(zip(("key", "value"), map(gpu.tensor, new), strict=True))
    tensors |= {name: gpu.tensor(getattr(inputs, name)) for name in names}
    tensors |= {name: gpu.tensor(scale) for name, scale in inputs.heads.items()}
    tensors["slot_mapping"] = gpu.tensor(rng.permutation(112)[:40])
    module.append_kv(**tensors | others)
    return tensors


@pytest.mark.parametrize("name", ["int8", "e4m3_of_heads"])
def test_append_has_the_bits_of_a_cpu(gpu, gpu_module, compiled, name):
    """Codes and scales, in slots that are written and in all others."""
    spec = SPECS[name]
    tensors = appended(gpu, gpu_module(spec), spec)
    gpu.run()
    on_cpu = appended(OnCpu(), compiled(spec), spec)
    for each in ("key_cache", "value_cache", "key_scale", "value_scale"):
        assert_same_bits(tensors[each].array, on_cpu[each])


class OnCpu:
    """Arrays as they are."""

    def tensor(self, array):
        return array.copy()


def test_append_refuses(gpu, gpu_module):
    spec = SPECS["int8"]
    module = gpu_module(spec)
    elsewhere = gpu.tensor(np.zeros((10, 2, 16), np.float32), 1)
    for scale, error, words in (
        (None, TypeError, "expected an array, since the spec has kv_dtype, got None"),
        (elsewhere, ValueError, "on CUDA device 0, where key is, got one on device 1"),
    ):
        gpu.log()
        with pytest.raises(error, match=rf"^value_scale: .*{re.escape(words)}"):
            appended(gpu, module, spec, value_scale=scale)
        assert gpu.log() == []


REFUSED = {
    "int4": (
        {"kv_dtype": "int4"},
        "fused",
        r"^kv_dtype: expected bfloat16, int8, float8_e4m3fn or float8_e5m2 for target cuda, got 'int4'$",
    ),
    "rotated": (
        {"kv_dtype": "int8", "kv_rotation": "hadamard"},
        "fused",
        r"^kv_rotation: expected None or none for target cuda, got 'hadamard'$",
    ),
    "staged": (
        {"kv_dtype": "int8"},
        "staged",
        r"^kv_dtype: expected bfloat16 for target cuda and pipeline staged, got 'int8'$",
    ),
}


@pytest.mark.parametrize(("fields", "pipeline", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cuda_does_not_have_is_refused_by_name(fields, pipeline, message):
    with pytest.raises(ValueError, match=message):
        pa_compiler.compile(dataclasses.replace(BASE, **fields), "cuda", pipeline)
