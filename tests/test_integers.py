"""Codes of int8 multiplied as integers of 16 bits: on this CPU, in plain operations, and what other CPUs are given."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import tvm
from builds import build_library
from inputs import POISONS, make_inputs
from integer_rows import HARD_FOR_A_UNIT, assert_not_finite_stays_in_its_row
from ragged_inputs import make_ragged
from tolerances import assert_close_to_oracle, assert_same_bits
from tvm.script import tirx as T

import pa_compiler
from pa_compiler import PagedAttentionSpec, backends, compiler
from pa_compiler.cpu import assembly, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.kernels.integers import integer_of, unit_of
from pa_compiler.runtime.cpu_features import missing_features


def spec_of(heads, kv_heads, head_dim, block_size, kv_layout="NHD", dtype="bfloat16", **fields):
    fields |= {"kv_layout": kv_layout, "kv_dtype": "int8"}
    return PagedAttentionSpec(heads, kv_heads, head_dim, block_size, dtype, "float32", **fields)


SPECS = {
    "group_1_HND": spec_of(2, 2, 16, 7, "HND", "float16"),
    "group_3_blocks_of_1": spec_of(6, 2, 48, 1),
    "group_4": spec_of(8, 2, 64, 5),
    "group_17": spec_of(17, 1, 32, 16),  # two tiles of 9 rows, of which one row pads the second
    "group_16": spec_of(16, 1, 32, 20, value_dim=24),  # heads in lanes
    "window_and_functions": spec_of(4, 2, 32, 8, window=37, softcap=20.0, alibi=True, sinks=True),
    "packed_group_5": spec_of(5, 1, 48, 16, "packed"),
    "packed_group_1": spec_of(2, 2, 16, 48, "packed", "float16"),
}
LENGTHS = [0, 1, 2, 3, 7, 15, 16, 20, 21, 0, 33, 61, 127, 128, 129, 130, 300, 2051]

ONE_OF_EACH = ("group_4", "group_16", "packed_group_5")
"""A spec for each strategy."""

each_strategy = pytest.mark.parametrize("spec", [SPECS[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(scope="module")
def cpu():
    return target.resolve({"kind": "llvm", "mcpu": "x86-64-v3"})


def integers(spec, cpu, pipeline="fused"):
    return tiling.choose(spec, cpu, pipeline).keys.integers


@pytest.fixture
def module(spec, cpu, compiled):
    """With vpmaddwd, which CPUs of this level have."""
    assert integers(spec, cpu)
    found = compiled(spec, target={"kind": "llvm", "mcpu": "x86-64-v3"})
    if missing := missing_features(found.manifest.features):
        pytest.skip(f"this CPU lacks {' '.join(missing)}")
    return found


@every_spec
def test_integers_are_multiplied_right(module, spec):
    inputs = make_inputs(spec, LENGTHS)
    out, lse = module.decode(*inputs.arguments, out=inputs.out, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@each_strategy
def test_poison_past_an_odd_length_and_garbage_scales(module, spec):
    clean = module.decode(*(inputs := make_inputs(spec, LENGTHS, poison="none")).arguments, **inputs.heads)
    for poison in POISONS:
        inputs = make_inputs(spec, LENGTHS, poison=poison)
        assert_same_bits(module.decode(*inputs.arguments, **inputs.heads), clean)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_plain_operations_have_the_same_bits(cpu, compiled, tmp_path, name):
    """What every CPU does where there are no instructions: sums of integers are exact in any order."""
    spec = SPECS[name]
    plain = dataclasses.replace(cpu, features=cpu.features - {"avx2"})
    build_library(spec, plain, tiling.choose(spec, cpu, "fused"), "fused", tmp_path)
    assert "vpmaddwd" not in (tmp_path / "kernels.s").read_text()
    inputs = make_inputs(spec, LENGTHS)
    modules = pa_compiler.load(tmp_path / "pa.so"), compiled(spec, target={"kind": "llvm", "mcpu": "x86-64-v3"})
    found = [module.decode(*inputs.arguments, return_lse=True, **inputs.heads) for module in modules]
    for plainly, by_instruction in zip(*found, strict=True):
        np.testing.assert_allclose(plainly, by_instruction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", HARD_FOR_A_UNIT)
@each_strategy
def test_what_one_unit_for_a_row_is_hard_for(module, spec, change):
    inputs = make_inputs(spec, [1, 40, 700, 129])
    inputs.query[...] = np.where(np.isfinite(inputs.query.astype(np.float32)), inputs.query, 0)
    change(inputs)
    out, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums(compiled, code):
    """All codes at an end, the widest head and the longest tile: sums that int32 has just room for."""
    spec = spec_of(4, 1, 512, 64)
    tuned = {"decode": {"kv_tile": 512, "second_level": 1 << 22}}
    module = compiled(spec, target={"kind": "llvm", "mcpu": "x86-64-v3", "tuned": tuned})
    if missing := missing_features(module.manifest.features):
        pytest.skip(f"this CPU lacks {' '.join(missing)}")
    inputs = make_inputs(spec, [512, 1024])
    inputs.query[...], inputs.key_cache[...], inputs.value_cache[...] = 1.999, code, code
    out, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@each_strategy
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_row(module, spec, number):
    assert_not_finite_stays_in_its_row(module, spec, number)


def test_packed_decode_has_the_bits_of_attend(compiled):
    spec = spec_of(10, 2, 64, 16, "packed")
    module, lens = compiled(spec, attend=True), (1, 33, 700, 128)
    inputs = make_inputs(spec, lens)
    decoded = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    starts = np.arange(len(lens) + 1, dtype=np.int32)
    for found, expected in zip(
        module.attend(*inputs.arguments, starts, return_lse=True, **inputs.heads), decoded, strict=True
    ):
        assert_same_bits(found, expected)
    ragged = make_ragged(spec, [(9, 700)], seed=3)
    whole = ragged.attend(module)[0]
    alone = make_ragged(spec, [(9, 700)], seed=3)
    module.num_threads = 3
    assert_same_bits(alone.attend(module)[0], whole)


def test_the_same_bits_of_an_invariant_spec(compiled):
    spec = spec_of(8, 2, 64, 16, invariant=True)
    module, lens = compiled(spec, attend=True), (40, 300, 1)
    inputs = make_inputs(spec, lens)
    starts = np.arange(len(lens) + 1, dtype=np.int32)
    decoded = module.decode(*inputs.arguments, **inputs.heads)
    assert_same_bits(module.attend(*inputs.arguments, starts, **inputs.heads), decoded)
    module.num_threads = 5
    assert_same_bits(module.decode(*inputs.arguments, **inputs.heads), decoded)


def test_units_and_integers(cpu):
    largest = np.float32([1, 1.5, 2 - 2**-15, 2 - 2**-16, 2 - 2**-23, 3e38, 2.0**-126, 1e-45, 0, np.inf, np.nan, 7])
    numbers = np.float32(np.linspace(-1, 1, 64))

    @T.prim_func(s_tir=True)
    def evaluate(largest_handle: T.handle, x_handle: T.handle, unit_handle: T.handle, integer_handle: T.handle):
        most = T.match_buffer(largest_handle, (12,), "float32")
        x = T.match_buffer(x_handle, (64,), "float32")
        units = T.match_buffer(unit_handle, (12,), "float32")
        found = T.match_buffer(integer_handle, (12, 64), "int32")
        for i in range(12):
            with T.sblock("unit"):
                vi = T.axis.spatial(12, i)
                units[vi] = unit_of(T.reinterpret("int32", most[vi]))
        for i, j in T.grid(12, 64):
            with T.sblock("integer"):
                vi, vj = T.axis.remap("SS", [i, j])
                found[vi, vj] = integer_of(x[vj] * most[vi], units[vi])

    given = largest, numbers, np.zeros_like(largest), np.zeros((12, 64), np.int32)
    arrays = [tvm.runtime.tensor(each) for each in given]
    tvm.compile(evaluate, target=tvm.target.Target(json.loads(cpu.config)))["evaluate"](*arrays)
    units, found = arrays[2].numpy(), arrays[3].numpy().astype(np.int16)  # the lower halves
    finite = np.isfinite(largest)
    assert np.isnan(units[~finite]).all()
    assert (np.frexp(units[finite])[0] == 0.5).all()  # powers of two
    normal = finite & (largest >= 2.0**-112)
    quotients = largest[normal] / units[normal].astype(np.float64)
    assert ((quotients >= 2**14 - 0.5) & (quotients < 2**15 - 0.5)).all()
    exact = (largest[:, None] * numbers)[finite].astype(np.float64) / units[finite, None]
    assert (np.abs(found[finite] - exact) <= 0.5).all()


_STORES_VECTOR = re.compile(r"vmov\w+\s+%[xyz]mm\d+, .*\(%rsp")
"""Of a vector to the stack, as of a sum for which there was no register."""


@pytest.mark.parametrize(("mcpu", "instruction"), [("x86-64-v3", "vpmaddwd"), ("znver4", "vpdpwssd")])
@pytest.mark.parametrize(
    ("heads", "kv_layout"),
    [((32, 8), "packed"), ((32, 8), "NHD"), ((16, 1), "NHD")],
    ids=["packed", "NHD", "heads_in_lanes"],
)
def test_the_matmuls_are_the_instruction(heads, kv_layout, mcpu, instruction):
    """No FMA is left in them, no code becomes float32, and sums are stored once: of head_dim in lanes on the stack."""
    texts = compiler.emit(spec_of(*heads, 128, 16, kv_layout), {"kind": "llvm", "mcpu": mcpu})
    assert instruction not in texts["scheduled"] + texts["tensorir"]
    loops = [loop.code for loop in assembly.inner_loops(texts["asm"]) if "fused_decode" in loop.function]
    counted = [(code, assembly.count(code)) for code in loops]
    matmuls = [each for each in counted if 16 <= each[1].dots <= 64]
    assert len(matmuls) >= 2
    for code, counts in matmuls:
        assert counts.fmas == counts.arithmetic == 0
        assert sum(line.startswith(instruction) for line in code) == counts.dots
        assert not any(line.startswith("vcvt") for line in code)
        sums = 8 if (heads, kv_layout) == ((32, 8), "NHD") else 0
        assert sum(bool(_STORES_VECTOR.match(line)) for line in code) <= sums, code


@pytest.mark.parametrize("mcpu", ["x86-64", "x86-64-v3", "x86-64-v4", "znver4", "alderlake", "sapphirerapids"])
def test_which_specs_and_targets_have_them(mcpu):
    cpu = target.resolve({"kind": "llvm", "mcpu": mcpu})
    has = mcpu != "x86-64"
    assert bool(cpu.integer_dots) == has
    spec = spec_of(8, 2, 64, 16)
    assert integers(spec, cpu) == (16 if has else 0)
    others = {"dtype": "float32"}, {"head_dim": 1024}, {"head_dim": 40}, {"kv_rotation": "hadamard"}
    for fields in (*others, {"kv_dtype": "float8_e5m2"}, {"kv_dtype": "int4"}, {"kv_dtype": None}):
        assert not integers(dataclasses.replace(spec, **fields), cpu), fields


def test_other_architectures_have_none():
    cpu = target.resolve(backends.normalize({"kind": "llvm", "mcpu": "neoverse-v2"}))
    assert not integers(spec_of(8, 2, 64, 16), cpu)
