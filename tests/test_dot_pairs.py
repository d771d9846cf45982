"""bfloat16 multiplied in pairs: the kernels for AVX512_BF16 run here in plain operations, its instruction is read."""

from __future__ import annotations

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
import tvm
from builds import build_library
from inputs import POISONS, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits
from tvm.script import tirx as T

import pa_compiler
from pa_compiler import PagedAttentionSpec, backends, compiler
from pa_compiler.cpu import assembly, products, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.kernels.elements import round_to_bfloat16

FEATURES = frozenset({"avx512f", "avx512vl", "avx512bf16"})
SAPPHIRE_RAPIDS = {"kind": "llvm", "mcpu": "sapphirerapids"}
WITHOUT_AMX = SAPPHIRE_RAPIDS | {"mattr": ["-amx-tile", "-amx-bf16", "-amx-int8"]}
"""AMX is what attend would take."""


def spec_of(heads, kv_heads, head_dim, block_size, kv_layout="NHD", head_tile=16):
    return PagedAttentionSpec(heads, kv_heads, head_dim, block_size, "bfloat16", "float32", kv_layout, head_tile)


SPECS = {
    "group_4": spec_of(4, 1, 32, 5),
    "group_1_HND": spec_of(2, 2, 16, 7, "HND"),
    "group_16": spec_of(16, 1, 32, 20),
    "group_33": spec_of(33, 1, 24, 16),  # three tiles of 11 rows; words in vectors of 4
    "packed_group_8": spec_of(8, 1, 48, 16, "packed"),
    "group_48": spec_of(48, 1, 32, 20, head_tile=64),  # more rows than a vector has lanes
}
LENGTHS = [0, 1, 2, 3, 7, 15, 16, 20, 21, 0, 33, 61, 127, 128, 129, 130, 300, 2051]


@pytest.fixture(scope="module")
def cpu():
    return target.resolve(backends.normalize("llvm"))


@pytest.fixture(scope="module", params=SPECS)
def module(request, cpu, tmp_path_factory):
    """Tiles for AVX512_BF16, compiled for this CPU: without the instruction its sums are plain operations."""
    spec = SPECS[request.param]
    tiles = tiling.choose(spec, dataclasses.replace(cpu, features=FEATURES), "fused")
    assert tiles.keys.terms == tiles.values.terms == 2
    directory = tmp_path_factory.mktemp("dot_pairs")
    build_library(spec, cpu, tiles, "fused", directory)
    return pa_compiler.load(directory / "pa.so")


def test_pairs_are_multiplied_right(module):
    inputs = make_inputs(module.spec, LENGTHS)
    out, lse = module.decode(*inputs.arguments, None, inputs.out, return_lse=True)
    assert_close_to_oracle(module.spec, inputs, out, lse)


def test_poison_past_an_odd_length(module):
    """The second token of the last pair is an unused slot."""
    clean = module.decode(*make_inputs(module.spec, LENGTHS, poison="none").arguments, return_lse=True)
    for poison in POISONS:
        inputs = make_inputs(module.spec, LENGTHS, poison=poison)
        for actual, expected in zip(module.decode(*inputs.arguments, return_lse=True), clean, strict=True):
            assert_same_bits(actual, expected)


def test_the_denominator_is_the_sum_of_the_rounded_probabilities(module):
    """So values of 1 come out as 1, to float32's accuracy, where a rounded probability is off by up to 0.4 %."""
    inputs = make_inputs(module.spec, LENGTHS[1:], poison="none")
    inputs.value_cache[:] = 1
    inputs.query[:] *= 8
    out = module.decode(*inputs.arguments, 1.0)
    np.testing.assert_allclose(out[inputs.context_lens > 0], 1, rtol=1e-5)


def emulated(lanes):
    """LLVM's text of the instruction for vectors of so many lanes: two fused multiply-adds."""
    vector, words = f"<{lanes} x float>", f"<{lanes} x i32>"
    halves = "".join(
        f"%{name}_low = shl {words} %{name}, splat (i32 16) %{name}0 = bitcast {words} %{name}_low to {vector} "
        f"%{name}_high = and {words} %{name}, splat (i32 -65536) %{name}1 = bitcast {words} %{name}_high to {vector} "
        for name in "ab"
    )
    fma = f"call {vector} @llvm.fma.v{lanes}f32({vector} %a{{0}}, {vector} %b{{0}}, {vector} %{{1}})"
    return (
        f"declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector}) "
        f"define {vector} @pa_dot_pairs_{lanes}({vector} %sum, {words} %a, {words} %b) alwaysinline {{ {halves}"
        f"%second = {fma.format(1, 'sum')} %both = {fma.format(0, 'second')} ret {vector} %both }} "
    )


@pytest.mark.parametrize("name", ["group_4", "packed_group_8", "group_48"])
def test_the_operation_that_becomes_the_instruction(cpu, tmp_path, monkeypatch, name):
    """Selected, vectorized and called as for AVX512_BF16, on this CPU's vectors, with what it calls written out."""
    monkeypatch.setattr(target.CpuTarget, "dots", dict.fromkeys((4, 8, 16), "an intrinsic"))
    monkeypatch.setattr(products, "_instructions", lambda dots: "".join(map(emulated, dots)))
    tiles = tiling.choose(SPECS[name], cpu, "fused")
    build_library(SPECS[name], cpu, tiles, "fused", tmp_path)
    lanes = 16 if name == "group_48" else tiles.qk_lanes
    assert f"call <{lanes} x float> @llvm.fma.v{lanes}f32" in (tmp_path / "kernels.ll").read_text()
    inputs = make_inputs(SPECS[name], LENGTHS)
    out, lse = pa_compiler.load(tmp_path / "pa.so").decode(*inputs.arguments, None, inputs.out, return_lse=True)
    assert_close_to_oracle(SPECS[name], inputs, out, lse)


def test_rounding_is_to_the_nearest_and_of_two_to_the_even(cpu):
    x = np.linspace(0, 1, 1 << 16, dtype=np.float32)
    x[:6] = [0, 1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, np.nan, 2.0**-126]  # two ties among them

    @T.prim_func(s_tir=True)
    def evaluate(x_handle: T.handle, y_handle: T.handle):
        x = T.match_buffer(x_handle, (1 << 16,), "float32")
        y = T.match_buffer(y_handle, (1 << 16,), "float32")
        for i in range(1 << 16):
            with T.sblock("round"):
                vi = T.axis.spatial(1 << 16, i)
                y[vi] = round_to_bfloat16(x[vi])

    y = tvm.runtime.tensor(np.empty_like(x))
    tvm.compile(evaluate, target=tvm.target.Target(json.loads(cpu.config)))["evaluate"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), x.astype(ml_dtypes.bfloat16).astype(np.float32))


_STORES_VECTOR = re.compile(r"vmov\w+\s+%[xyz]mm\d+, .*\(%rsp")
"""Of a vector to the stack, as of a sum for which there was no register."""


@pytest.mark.parametrize(
    ("heads", "kv_layout"),
    [((32, 8), "packed"), ((32, 8), "NHD"), ((16, 1), "NHD")],
    ids=["packed", "NHD", "heads_in_lanes"],
)
def test_the_matmuls_are_the_instruction(heads, kv_layout):
    """On AVX512_BF16 no FMA is left in them, no element is made float32, and their sums stay in registers."""
    texts = compiler.emit(spec_of(*heads, 128, 16, kv_layout), WITHOUT_AMX)
    assert "dpbf16ps" not in texts["scheduled"] + texts["tensorir"]
    counted = [(loop.code, assembly.count(loop.code)) for loop in assembly.inner_loops(texts["asm"])]
    matmuls = [each for each in counted if each[1].dots >= 16 and (each[1].prefetches or each[1].embedded)]
    assert len(matmuls) >= 2
    rows_paired = []
    for code, counts in matmuls:
        assert counts.fmas == counts.arithmetic == 0
        assert not any(_STORES_VECTOR.match(line) for line in code), code
        paired = sum(line.startswith(("vpermt2w", "vpermi2w")) for line in code)
        masked = sum(
            line.startswith("vandps") and "{1to8}" in line for line in code
        )  # values that some rows do not see
        assert counts.conversions == paired + masked
        rows_paired.append(counts.dots / paired if paired else 0)
    assert sorted(set(rows_paired)) == ([0, 4] if (heads, kv_layout) == ((32, 8), "NHD") else [0])


@pytest.mark.parametrize("rows", [32, 64])
def test_more_rows_than_a_vector_has_lanes(rows):
    asm = compiler.emit(spec_of(rows, 1, 128, 16, head_tile=64), SAPPHIRE_RAPIDS)["asm"]
    counted = [(loop.code, assembly.count(loop.code)) for loop in assembly.inner_loops(asm)]
    matmuls = [each for each in counted if each[1].dots > each[1].fmas]  # exponentials are summed by it too
    assert {counts.dots % (rows // 16) for _, counts in matmuls} == {0}
    assert {(counts.fmas, counts.arithmetic) for _, counts in matmuls} == {(0, 0)}
    assert not [line for code, _ in matmuls for line in code if _STORES_VECTOR.match(line)]


@pytest.mark.parametrize("mcpu", ["sapphirerapids", "znver4", "cooperlake", "x86-64-v4", "znver3"])
def test_which_targets_have_it(mcpu):
    cpu = target.resolve({"kind": "llvm", "mcpu": mcpu})
    chosen = {
        (dtype, head_dim, pipeline): tiling.choose(
            PagedAttentionSpec(8, 2, head_dim, 16, dtype), cpu, pipeline
        ).keys.terms
        == 2
        for dtype in ("float32", "float16", "bfloat16")
        for head_dim in (127, 6, 128)
        for pipeline in ("fused", "staged")
    }
    has = mcpu in ("sapphirerapids", "znver4", "cooperlake")
    assert {key for key, pairs in chosen.items() if pairs} == ({("bfloat16", 128, "fused")} if has else set())
