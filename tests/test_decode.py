"""Module.decode against the float64 oracle, along every axis of the spec and of the call.

A spec takes seconds to compile and a call takes microseconds: each test compiles one spec and puts all the lengths
and batches that it has a use for through it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import DTYPES, make_inputs
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cases import CASES

PIPELINES = ("fused", "staged")
BASE = PagedAttentionSpec(num_heads=8, num_kv_heads=2, head_dim=32, block_size=8, dtype="float32")

SPECS = {
    **{
        f"heads_{count}": {"num_heads": count, "num_kv_heads": 1}
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 31, 33, 64, 65)
    },
    **{
        f"heads_{heads}_over_{kv_heads}": {"num_heads": heads, "num_kv_heads": kv_heads}
        for heads, kv_heads in ((3, 3), (32, 8), (10, 2), (34, 2), (66, 2), (128, 2))
    },
    **{f"head_dim_{size}": {"head_dim": size} for size in (1, 7, 8, 16, 64, 80, 96, 100, 112, 128, 192, 256)},
    **{f"head_tile_{size}": {"head_tile": size, "num_heads": 20, "num_kv_heads": 1} for size in (1, 4, 64)},
    **{f"batch_chunk_{size}": {"batch_chunk": size} for size in (1, 5, 1024)},
}
"""Each varies one thing of BASE; the dtypes take turns."""

STAGED_TOO = ("heads_1", "heads_5", "heads_17", "heads_65", "heads_34_over_2", "head_dim_7", "head_dim_256")
STAGED_TOO += ("head_tile_4", "batch_chunk_5")

FEW_SEQUENCES = {"Case1": 3, "Case2": 2, "Case3": 2}
"""Of the seed's three big cases, in the default run."""


def check(module, inputs, scale=None):
    out, lse = module.decode(*inputs.arguments, scale, inputs.out, return_lse=True)
    assert_close_to_oracle(module.spec, inputs, out, lse, scale)


def spec_variants():
    for index, (name, fields) in enumerate(SPECS.items()):
        spec = dataclasses.replace(BASE, **{"dtype": tuple(DTYPES)[index % 3], "out_dtype": None, **fields})
        for pipeline in PIPELINES if name in STAGED_TOO else ("fused",):
            yield pytest.param(spec, pipeline, id=f"{name}-{spec.dtype}-{pipeline}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", CASES)
def test_seed_case(compiled, name, pipeline, dtype):
    _check_seed_case(compiled, name, pipeline, dtype, FEW_SEQUENCES.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", FEW_SEQUENCES)
def test_seed_case_at_full_size(compiled, name, pipeline, dtype):
    _check_seed_case(compiled, name, pipeline, dtype, None)


def _check_seed_case(compiled, name, pipeline, dtype, sequences):
    case = CASES[name]
    spec = dataclasses.replace(case.spec, dtype=dtype)
    context_lens = case.context_lens[:sequences]
    surplus = case.max_blocks - -(-int(context_lens.max()) // spec.block_size)
    check(compiled(spec, pipeline), make_inputs(spec, context_lens, surplus=surplus), case.scale)


@pytest.mark.parametrize(("spec", "pipeline"), spec_variants())
def test_spec(compiled, spec, pipeline):
    size = spec.block_size
    lengths = [0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1, 0, 130, 17 * size - 1]
    check(compiled(spec, pipeline), make_inputs(spec, lengths * 2))  # 20: a full chunk of 16 and a short one


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("num_heads", range(1, 66))
def test_every_head_count(compiled, num_heads, pipeline):
    spec = dataclasses.replace(BASE, num_heads=num_heads, num_kv_heads=1, head_dim=16)
    check(compiled(spec, pipeline), make_inputs(spec, [0, 1, 7, 8, 9, 33, 130]))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 64, 128, 256])
def test_every_length_to_three_blocks(compiled, block_size, pipeline):
    spec = PagedAttentionSpec(4, 2, 16, block_size, "float32")
    lengths = np.random.default_rng(block_size).permutation(3 * block_size + 2)  # neighbours in a chunk differ
    check(compiled(spec, pipeline), make_inputs(spec, lengths))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_batch_to_49(compiled, pipeline):
    module = compiled(BASE, pipeline)
    for batch in range(50):
        check(module, make_inputs(BASE, np.random.default_rng(batch).integers(0, 26, batch), seed=batch))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_before_tokens(compiled, dtype, pipeline):
    spec = dataclasses.replace(BASE, num_heads=34, dtype=dtype, out_dtype=dtype, kv_layout="HND")
    check(compiled(spec, pipeline), make_inputs(spec, [0, 1, 7, 8, 9, 31, 200]))


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "pipeline"),
    [
        ("float32", "float16", "fused"),
        ("float32", "bfloat16", "staged"),
        ("float16", "float32", "staged"),
        ("float16", "bfloat16", "fused"),
        ("bfloat16", "float32", "fused"),
        ("bfloat16", "float16", "fused"),
    ],
)
def test_out_dtype(compiled, dtype, out_dtype, pipeline):
    spec = dataclasses.replace(BASE, dtype=dtype, out_dtype=out_dtype)
    check(compiled(spec, pipeline), make_inputs(spec, [0, 1, 7, 8, 9, 31, 200]))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("block_size", [16, 5])
def test_lengths_around_the_splits(compiled, block_size, pipeline):
    """2048 tokens and their multiples, which a block of 5 does not divide."""
    spec = PagedAttentionSpec(5, 1, 16, block_size, "float32")
    around = [2048 * ranges + offset for ranges in (1, 2, 3) for offset in (-5, -1, 0, 1, 2, 5)]
    check(compiled(spec, pipeline), make_inputs(spec, [*around, 0, 1, 8192]))


def test_131072_tokens(compiled):
    spec = PagedAttentionSpec(4, 1, 64, 16, "float32")
    check(compiled(spec), make_inputs(spec, [131072, 3]))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_million_tokens(compiled, pipeline):
    spec = PagedAttentionSpec(4, 1, 64, 16, "float32")
    check(compiled(spec, pipeline), make_inputs(spec, [1_000_003]))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(
    "scale", [None, 1, 0.1, -1.0, 0.0, -0.0, 30.0, 1e-30, np.float32(0.5), np.float64(0.3)], ids=repr
)
def test_scale(compiled, scale, pipeline):
    check(compiled(BASE, pipeline), make_inputs(BASE, [0, 1, 9, 31, 2500]), scale)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_sequences_may_share_blocks(compiled, pipeline):
    """A common prefix, and the same sequence twice."""
    inputs = make_inputs(BASE, [40, 37, 25, 40, 19]).take([0, 1, 2, 3, 4, 1])
    inputs.block_table[1:4, :3] = inputs.block_table[0, :3]
    inputs.block_table[5] = inputs.block_table[1]
    check(compiled(BASE, pipeline), inputs)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_is_returned(compiled, pipeline):
    module, inputs = compiled(BASE, pipeline), make_inputs(BASE, [0, 3, 40, 2500])
    out = module.decode(*inputs.arguments)
    both = module.decode(*inputs.arguments, return_lse=True)
    given_out, given_lse = inputs.out, inputs.lse
    returned = module.decode(*inputs.arguments, out=given_out, lse=given_lse, return_lse=True)
    assert returned[0] is given_out
    assert returned[1] is given_lse
    assert module.decode(*inputs.arguments, out=given_out) is given_out
    for result in (both[0], given_out):
        assert_same_bits(result, out)
    assert_same_bits(given_lse, both[1])
    assert not out[0].any()
    assert np.isneginf(given_lse[0]).all()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_inputs_are_left_alone(compiled, pipeline):
    inputs = make_inputs(BASE, [0, 3, 40, 9])
    before = [array.tobytes() for array in inputs.arguments]
    compiled(BASE, pipeline).decode(*inputs.arguments)
    assert [array.tobytes() for array in inputs.arguments] == before


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_nothing_to_read(compiled, pipeline):
    """No sequences, no blocks, no width, and all of them at once, as a batch that has just been formed has it."""
    module = compiled(BASE, pipeline)
    check(module, make_inputs(BASE, []))
    check(module, make_inputs(BASE, [], spare_blocks=0, surplus=0))
    check(module, make_inputs(BASE, [0, 0, 0], spare_blocks=0, surplus=0))
    check(module, make_inputs(BASE, [0] * 17, surplus=0))
