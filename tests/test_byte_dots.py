"""kv_dots int8: codes of int4 multiplied by integers of 8 bits in decode; on this CPU, plainly, and for other CPUs."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from builds import build_library
from inputs import POISONS, make_inputs
from integer_rows import HARD_FOR_A_UNIT, assert_not_finite_stays_in_its_row
from ragged_inputs import assert_near_float64, make_ragged
from tolerances import assert_close_to_oracle, assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec, compiler
from pa_compiler.cpu import assembly, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.runtime.cpu_features import missing_features
from pa_compiler.verification.accuracy import drawn, measure
from pa_compiler.verification.comparison import oracle
from pa_compiler.verification.tolerances import TOLERANCES

V3 = {"kind": "llvm", "mcpu": "x86-64-v3"}


def spec_of(heads, kv_heads, head_dim, block_size, kv_layout="NHD", dtype="bfloat16", **fields):
    fields |= {"kv_layout": kv_layout, "kv_dtype": "int4", "kv_dots": "int8"}
    return PagedAttentionSpec(heads, kv_heads, head_dim, block_size, dtype, "float32", **fields)


SPECS = {
    "group_1_HND": spec_of(2, 2, 64, 7, "HND", "float16"),
    "group_3_not_rotated": spec_of(6, 2, 96, 1, kv_rotation="none"),
    "group_4": spec_of(8, 2, 64, 5),
    "group_4_float32": spec_of(8, 2, 128, 16, dtype="float32"),
    "group_8_HND": spec_of(8, 1, 128, 32, "HND"),
    "group_16": spec_of(16, 1, 64, 20, value_dim=32),  # lanes of which no heads lie in
    "group_17": spec_of(17, 1, 32, 16, value_dim=128),  # two tiles of 9 rows, of which one row pads the second
    "window_and_functions": spec_of(4, 2, 32, 8, window=37, softcap=20.0, alibi=True, sinks=True),
    "mask": spec_of(4, 2, 64, 4, mask_mod=lambda batch, head, query_pos, key_pos: key_pos % 3 != head % 3),
}
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 15, 16, 20, 21, 0, 33, 61, 127, 128, 129, 130, 300, 2051]

ONE_OF_EACH = ("group_1_HND", "group_3_not_rotated", "group_4_float32")

each_kind = pytest.mark.parametrize("spec", [SPECS[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture
def module(spec, compiled):
    """With vpmaddubsw, which CPUs of this level have."""
    found = compiled(spec, target=V3, attend=True)
    if missing := missing_features(found.manifest.features):
        pytest.skip(f"this CPU lacks {' '.join(missing)}")
    return found


@every_spec
def test_decode_is_close_to_the_reference(module, spec):
    inputs = make_inputs(spec, LENGTHS)
    out, lse = module.decode(*inputs.arguments, out=inputs.out, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@each_kind
def test_poison_past_an_odd_length_and_garbage_scales(module, spec):
    clean = module.decode(*(inputs := make_inputs(spec, LENGTHS, poison="none")).arguments, **inputs.heads)
    for poison in POISONS:
        inputs = make_inputs(spec, LENGTHS, poison=poison)
        assert_same_bits(module.decode(*inputs.arguments, **inputs.heads), clean)


@every_spec
def test_nothing_depends_on_threads_the_batch_or_places(module, spec):
    inputs = make_inputs(spec, LENGTHS, seed=4)
    out = module.decode(*inputs.arguments, **inputs.heads)
    if spec.mask_mod is None:  # a function of scores may ask for the sequence's number
        for number, threads in enumerate((1, 3, 8), 15):
            module.num_threads = threads
            assert_same_bits(module.decode(*inputs.arguments, **inputs.heads), out)
            alone = inputs.take([number])
            assert_same_bits(module.decode(*alone.arguments, **inputs.heads)[0], out[number])
    moved = make_inputs(spec, LENGTHS, seed=4, placement=5)  # other places, and other poison there
    assert_same_bits(module.decode(*moved.arguments, **moved.heads), out)


@every_spec
def test_a_single_token_has_the_bits_of_decode_in_attend(module, spec):
    """attend multiplies float32 where a sequence has several query tokens, and is as close to the reference."""
    inputs = make_inputs(spec, LENGTHS[1:11])
    starts = np.arange(len(inputs.context_lens) + 1, dtype=np.int32)
    decoded = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    attended = module.attend(*inputs.arguments, starts, return_lse=True, **inputs.heads)
    for found, expected in zip(attended, decoded, strict=True):
        assert_same_bits(found, expected)
    ragged = make_ragged(spec, [(1, 33), (20, 700), (31, 31), (0, 5), (3, 129)], seed=1)
    assert_near_float64(spec, ragged, *ragged.attend(module))


@each_kind
def test_verify_finds_nothing(module):
    found = module.verify(2, seed=5)
    assert found.passed, found.failures[0]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_plain_operations_have_the_same_results(compiled, tmp_path, name):
    """What every CPU does where there are no instructions: sums of integers are exact in any order."""
    spec, cpu = SPECS[name], target.resolve(V3)
    plain = dataclasses.replace(cpu, features=cpu.features - {"avx2"})
    build_library(spec, plain, tiling.choose(spec, cpu, "fused"), "fused", tmp_path)
    assert "vpmaddubsw" not in (tmp_path / "kernels.s").read_text()
    inputs = make_inputs(spec, LENGTHS)
    modules = pa_compiler.load(tmp_path / "pa.so"), compiled(spec, target=V3, attend=True)
    found = [module.decode(*inputs.arguments, return_lse=True, **inputs.heads) for module in modules]
    for plainly, by_instruction in zip(*found, strict=True):
        np.testing.assert_allclose(plainly, by_instruction, rtol=1e-5, atol=1e-6)


def negative_scales(inputs):
    for name in ("key_scale", "value_scale"):
        inputs.heads[name][:, :, ::3] *= -1


HARD = (*HARD_FOR_A_UNIT, negative_scales)


@pytest.mark.parametrize("change", HARD)
@each_kind
def test_what_one_unit_for_a_row_is_hard_for(module, spec, change):
    inputs = make_inputs(spec, [1, 40, 700, 129])
    change(inputs)
    out, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@pytest.mark.parametrize("code", [0x00, 0x0F, 0xF0, 0xFF])
def test_the_largest_sums(compiled, code):
    """All codes at an end, and integers of 127: what vpmaddubsw has to hold in 16 bits."""
    spec = spec_of(4, 1, 256, 64, kv_rotation="none")
    module = compiled(spec, target=V3)
    if missing := missing_features(module.manifest.features):
        pytest.skip(f"this CPU lacks {' '.join(missing)}")
    inputs = make_inputs(spec, [128, 1024])
    inputs.query[...], inputs.key_cache[...], inputs.value_cache[...] = 1.999, code, code
    out, lse = module.decode(*inputs.arguments, return_lse=True, **inputs.heads)
    assert_close_to_oracle(spec, inputs, out, lse)


@each_kind
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_row(module, spec, number):
    assert_not_finite_stays_in_its_row(module, spec, number, scale=(0,))


@pytest.mark.parametrize("kind", ["plain", "outliers"])
def test_the_error_is_below_that_of_int4(compiled, kind):
    """What integers of 8 bits add is a seventh of what codes of 4 bits cost: together 1.02 times as much, at most."""
    spec = spec_of(8, 2, 128, 32)
    data = drawn(spec, 1000, 4, outliers=kind == "outliers", seed=3)
    exact = dataclasses.replace(spec, kv_dots=None)
    by_bytes, by_float32 = (measure(compiled(each), data) for each in (spec, exact))
    assert by_bytes.out_of_all < 1.02 * by_float32.out_of_all


def test_the_bound_is_no_wider_than_what_integers_cost():
    """Of evenly spread data it is a few times that of bfloat16: a tenth of the values, a hundredth with float32."""
    spec = SPECS["group_4_float32"]
    inputs = make_inputs(spec, [300, 700])
    expected = oracle(spec, *inputs.arguments, None, spec.kv_layout, **inputs.heads)
    out, bound = expected["out"]
    assert bound.max() < 3 * TOLERANCES["bfloat16"].of_magnitude
    assert bound.mean() < np.abs(out).mean() / 2


_STORES_VECTOR = re.compile(r"vmov\w+\s+%[xyz]mm\d+, .*\(%rsp")
"""Of a vector to the stack, as of a sum for which there was no register."""

INSTRUCTIONS = {"x86-64-v3": "vpmaddubsw", "x86-64-v4": "vpmaddubsw", "alderlake": "vpdpbusd", "znver4": "vpdpbusd"}


@pytest.mark.parametrize(("mcpu", "instruction"), INSTRUCTIONS.items())
def test_the_matmuls_are_the_instruction(mcpu, instruction):
    """No FMA is left in them, no code becomes float32, and values have no sum on the stack."""
    texts = compiler.emit(spec_of(32, 8, 128, 16), {"kind": "llvm", "mcpu": mcpu})
    assert instruction not in texts["scheduled"] + texts["tensorir"]
    loops = [loop.code for loop in assembly.inner_loops(texts["asm"]) if "fused_decode" in loop.function]
    matmuls = [code for code in loops if sum(instruction in line for line in code) >= 16]
    assert len(matmuls) >= 2
    for code in matmuls:
        counts = assembly.count(code)
        assert counts.fmas == counts.arithmetic == 0
        assert counts.dots == sum(instruction in line for line in code)
    assert not any(_STORES_VECTOR.match(line) for line in matmuls[-1])


def test_attend_has_no_such_dots():
    cpu = target.resolve(V3)
    spec = spec_of(8, 2, 64, 16)
    decode, attend = tiling.choose(spec, cpu, "fused"), tiling.choose_attend(spec, cpu)
    assert (decode.keys.integers, decode.keys.terms, decode.values.terms) == (8, 4, 4)
    assert (attend.keys.integers, attend.keys.terms, attend.values.terms) == (0, 1, 1)
    assert decode.keys.word == attend.keys.word  # the host has one size of words
