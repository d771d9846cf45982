"""The seed's cases, their inputs, and the comparison with the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pa_compiler import reference
from pa_compiler.verification import cases
from pa_compiler.verification.comparison import Errors
from pa_compiler.verification.tolerances import tolerance

SMALL = cases.CASES["CaseVarSeq4"]


def test_case1_has_a_gigabyte_of_cache():
    case = cases.CASES["Case1"]
    assert (case.num_tokens, case.num_blocks, case.max_blocks) == (256 * 8192, 256 * 64, 256)
    assert case.cache_bytes == case.kv_bytes == 2**30
    assert case.flops == 4 * 256 * 8192 * 16 * 128


def test_unused_slots_and_shared_blocks_are_counted_once():
    assert SMALL.num_tokens == 33 + 64 + 128 + 15
    assert SMALL.num_blocks == 3 + 4 + 8 + 1
    assert SMALL.kv_bytes == 2 * 240 * 16 * 2
    assert SMALL.cache_bytes == 2 * 16 * 16 * 16 * 2


@pytest.mark.parametrize("kv_layout", ["NHD", "HND", "packed"])
def test_inputs_are_the_seeds(kv_layout):
    case = dataclasses.replace(SMALL, spec=dataclasses.replace(SMALL.spec, num_kv_heads=2, kv_layout=kv_layout))
    written = []
    inputs = cases.make_inputs(case, seed=3, advance=written.append)
    assert sum(written) == inputs.query.size + inputs.key_cache.size + inputs.value_cache.size
    assert inputs.key_cache.shape == (16, *case.spec.key_cache_shape[1:])
    assert inputs.value_cache.shape == (16, *case.spec.value_cache_shape[1:])
    assert inputs.block_table.shape == (4, 16)
    assert inputs.context_lens.tolist() == [33, 64, 128, 15]
    assert {str(array.dtype) for array in inputs} == {"bfloat16", "int32"}
    for array, half in ((inputs.query, 0.5), (inputs.key_cache, 0.5), (inputs.value_cache, 1.0)):
        assert 0.9 * half < np.abs(array.astype(np.float32)).max() <= half
    assert 0 <= inputs.block_table.min() <= inputs.block_table.max() < case.num_blocks
    again = cases.make_inputs(case, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(inputs, again, strict=True))


@pytest.mark.parametrize("kv_layout", ["NHD", "packed"])
def test_compare_sees_an_error_in_any_sequence(kv_layout):
    case = dataclasses.replace(SMALL, spec=dataclasses.replace(SMALL.spec, kv_layout=kv_layout))
    inputs = cases.make_inputs(case)
    exact = reference.decode(*inputs, case.scale, kv_layout=kv_layout)
    assert cases.compare(exact, case, inputs) == Errors(0.0, 0.0)
    for position in ((0, 0, 0), (3, 15, 15)):
        for wrong in (1.0, np.inf, np.nan):
            out = exact.copy()
            out[position] += wrong
            assert not cases.compare(out, case, inputs).of_tolerance <= 1


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_values_of_another_size(shared):
    """Multi-head latent attention in small: what is read once counts once."""
    spec = dataclasses.replace(SMALL.spec, head_dim=24, value_dim=16, shared_kv=shared)
    case = dataclasses.replace(SMALL, spec=spec)
    assert case.flops == 2 * 240 * 16 * (24 + 16)
    assert case.kv_bytes == 240 * (24 if shared else 24 + 16) * 2
    written = []
    inputs = cases.make_inputs(case, advance=written.append)
    assert sum(written) == inputs.query.size + case.cache_bytes // 2
    values = inputs.key_cache[..., :16] if shared else inputs.value_cache
    assert (inputs.value_cache is None) == shared
    assert values.shape == (16, *spec.value_cache_shape[1:])
    exact = reference.decode(*inputs._replace(value_cache=values), case.scale)
    assert exact.shape == (4, 16, 16)
    assert cases.compare(exact, case, inputs) == Errors(0.0, 0.0)
    exact[-1, -1, -1] += 1
    assert not cases.compare(exact, case, inputs).of_tolerance <= 1
    assert not cases.compare(exact[..., :8], case, inputs).of_tolerance <= 1


def test_an_empty_sequence_has_to_be_met_exactly():
    case = dataclasses.replace(SMALL, seq_lens=(0, 5))
    inputs = cases.make_inputs(case)
    out = reference.decode(*inputs, case.scale)
    assert cases.compare(out, case, inputs).of_tolerance == 0
    out[0, 0, 0] = 1e-30
    assert cases.compare(out, case, inputs).of_tolerance == np.inf


def test_tolerance_is_that_of_the_coarser_type():
    def of(dtype, out_dtype, length):
        return tolerance(dataclasses.replace(SMALL.spec, dtype=dtype, out_dtype=out_dtype), length)

    assert of("float32", "float32", 8192) == (0, 1e-5)
    assert of("float32", "float32", 8193) == (0, 3e-5)
    assert of("float16", "float32", 8193) == of("float32", "float16", 5) == (1e-3, 1e-3)
    assert of("float16", "bfloat16", 5) == of("bfloat16", "float32", 5) == (1e-2, 8e-3)
