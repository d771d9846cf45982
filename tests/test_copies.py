"""Modules in copies, pickles and other processes: the library goes along, with its sources and settings."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import operator
import pickle
import subprocess
import sys

import numpy as np
import pytest
from inputs import make_inputs
from specs import BASE, SPECS
from tolerances import assert_same_bits

import pa_compiler

WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "oldest_pickle": lambda module: pickle.loads(pickle.dumps(module, protocol=0)),
}

every_way = pytest.mark.parametrize("again", WAYS.values(), ids=WAYS)

OF_ANOTHER_PROCESS = """
import pickle, sys
import numpy as np
with open(sys.argv[1], "rb") as file:
    module, arguments = pickle.load(file)
np.save(sys.argv[2], module.decode(*arguments))
assert not [name for name in sys.modules if name.partition(".")[0] == "tvm"]
"""


class Own(pa_compiler.Module):
    """A class of the user's."""


@every_way
@pytest.mark.parametrize("pipeline", ["fused", "staged"])
def test_a_module(compiled, again, pipeline):
    module, inputs = compiled(BASE, pipeline), make_inputs(BASE, [9, 0, 2500])
    other = again(module)
    assert type(other) is pa_compiler.Module
    assert other is not module
    assert (other.spec, other.pipeline, other.target) == (module.spec, module.pipeline, module.target)
    assert other.manifest == module.manifest
    assert dict(other.sources) == dict(module.sources)
    assert other.num_threads == 2
    assert_same_bits(other.decode(*inputs.arguments), module.decode(*inputs.arguments))
    other.num_threads = 7
    assert module.num_threads == 2
    assert again(other).num_threads == 7


@every_way
def test_a_loaded_module(compiled, tmp_path, again):
    compiled(BASE).save(tmp_path / "pa.so")
    other = again(pa_compiler.load(tmp_path / "pa.so"))
    assert not other.sources
    other.save(tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == (tmp_path / "pa.so").read_bytes()


@pytest.mark.parametrize("again", [WAYS["deepcopy"], WAYS["pickle"]], ids=["deepcopy", "pickle"])
def test_inside_of_what_a_user_has(compiled, again):
    """A model that holds one module twice still does."""
    module = compiled(BASE)
    model = again({"layers": [module, module]})
    assert model["layers"][0] is model["layers"][1]
    assert model["layers"][0] is not module


@every_way
def test_a_class_of_the_users(compiled, again):
    module = compiled(BASE)
    own = Own(module._library, module.manifest, module._functions)
    assert type(again(own)) is Own


@every_way
def test_bfloat16(compiled, again):
    """NumPy's dtypes are told by identity in a call: they are here too."""
    spec = SPECS["bfloat16_HND"]
    module, inputs = compiled(spec), make_inputs(spec, [9, 0, 37])
    assert_same_bits(again(module).decode(*inputs.arguments), module.decode(*inputs.arguments))


@every_way
def test_a_module_for_a_gpu(gpu_module, again):
    spec = pa_compiler.PagedAttentionSpec(8, 2, 64, 16, "bfloat16")
    module = gpu_module(spec)
    other = again(module)
    assert type(other) is type(module)
    assert (other.spec, other.target) == (module.spec, module.target)
    assert dict(other.sources) == dict(module.sources)
    assert other.checks("decode") == module.checks("decode")


def test_a_library_for_another_cpu(compiled):
    """As compile gives it: it is for decode to refuse."""
    module = compiled(SPECS["float16"], "fused", {"kind": "llvm", "mcpu": "x86-64-v4"})
    assert copy.deepcopy(module).target == module.target


def test_in_another_process(compiled, tmp_path):
    """Which imports no TVM for it."""
    module, inputs = compiled(BASE), make_inputs(BASE, [9, 0, 2500])
    (tmp_path / "module.pickle").write_bytes(pickle.dumps((module, inputs.arguments)))
    paths = [str(tmp_path / name) for name in ("module.pickle", "out.npy")]
    subprocess.run([sys.executable, "-W", "error", "-c", OF_ANOTHER_PROCESS, *paths], check=True, cwd=tmp_path)
    assert_same_bits(np.load(paths[1]), module.decode(*inputs.arguments))


def test_workers(compiled):
    """Processes that multiprocessing starts anew."""
    module, inputs = compiled(BASE), make_inputs(BASE, [9, 0, 2500])
    module.num_threads = 1
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found = pool.submit(operator.methodcaller("decode", *inputs.arguments), module).result()
        assert pool.submit(operator.attrgetter("num_threads"), module).result() == 1
    module.num_threads = 2
    assert_same_bits(found, module.decode(*inputs.arguments))


def test_a_damaged_pickle(compiled):
    function, (kind, library, *rest) = compiled(BASE).__reduce__()
    changed = bytes([*library[:1000], library[1000] ^ 1, *library[1001:]])
    with pytest.raises(RuntimeError, match=r"^module\.so: expected a library of SHA-256"):
        function(kind, changed, *rest)
