"""Module.decode against the float64 oracle, along every axis of the spec and of the call.

A spec takes seconds to compile and a call takes microseconds: each test compiles one spec and puts all the lengths
and batches that it has a use for through it.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from inputs import DTYPES, make_inputs
from specs import (
    BASE,
    OUT_DTYPE_SPECS,
    PIPELINES,
    every_pipeline,
    every_spec,
    in_turn,
    lengths_around_the_splits,
    parametrize,
)
from specs import SPECS as SHARED
from tolerances import assert_close_to_oracle, assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.cpu import target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.machines import AVX2
from pa_compiler.verification.cases import CASES

SHAPES = [  # heads, kv heads, head_dim; the seed's cases have 16 and 64 heads of 16, 128 and 256
    (1, 1, 8), (2, 1, 16), (3, 1, 64), (4, 1, 80), (5, 1, 96), (6, 1, 112), (7, 1, 192), (8, 1, 1), (12, 1, 7),
    (17, 1, 100), (33, 1, 24), (65, 1, 80), (32, 8, 32), (34, 2, 32), (128, 2, 32), (2, 1, 1021),
]  # fmt: skip
SPECS = {  # the dtypes take turns
    **{
        f"{heads}_heads_over_{kv_heads}_of_{head_dim}": PagedAttentionSpec(heads, kv_heads, head_dim, 8, dtype)
        for (heads, kv_heads, head_dim), dtype in zip(SHAPES, itertools.cycle(DTYPES), strict=False)
    },
    **OUT_DTYPE_SPECS,
    "batch_chunk_5": dataclasses.replace(BASE, batch_chunk=5),
    # several tiles of rows for each of several kv heads, in a sweep
    "2_tiles_of_a_group_swept": PagedAttentionSpec(8, 2, 32, 8, "float32", head_tile=2),
    "2_tiles_of_a_group_swept_in_HND": PagedAttentionSpec(6, 3, 32, 8, "bfloat16", kv_layout="HND", head_tile=1),
}
STAGED_TOO = [
    "1_heads_over_1_of_8", "17_heads_over_1_of_100", "65_heads_over_1_of_80", "34_heads_over_2_of_32",
    "float32_to_bfloat16_tile_4", "batch_chunk_5",
]  # fmt: skip

FEW_SEQUENCES = {"Case1": 3, "Case2": 2, "Case3": 2}
"""Of the seed's three big cases, in the default run."""

BLOCK_SIZES = {
    **{spec.block_size: spec for spec in (BASE, SHARED["float32_MQA"])},
    **{size: PagedAttentionSpec(4, 2, 16, size, "float32") for size in (1, 8, 32, 64, 256)},
    16: dataclasses.replace(CASES["CaseSmall1"].spec, dtype="float32"),
}


def check(module, inputs, scale=None):
    out, lse = module.decode(*inputs.arguments, scale, inputs.out, return_lse=True, **inputs.heads)
    assert_close_to_oracle(module.spec, inputs, out, lse, scale)


@in_turn(("name", "pipeline", "dtype"), CASES, PIPELINES, DTYPES)
def test_seed_case(compiled, name, pipeline, dtype):
    _check_seed_case(compiled, name, pipeline, dtype, FEW_SEQUENCES.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@every_pipeline
@pytest.mark.parametrize("name", FEW_SEQUENCES)
def test_seed_case_at_full_size(compiled, name, pipeline, dtype):
    _check_seed_case(compiled, name, pipeline, dtype, None)


def _check_seed_case(compiled, name, pipeline, dtype, sequences):
    case = CASES[name]
    spec = dataclasses.replace(case.spec, dtype=dtype)
    context_lens = case.context_lens[:sequences]
    surplus = case.max_blocks - -(-int(context_lens.max()) // spec.block_size)
    check(compiled(spec, pipeline), make_inputs(spec, context_lens, surplus=surplus), case.scale)


@every_spec
def test_shared_spec(compiled, spec, pipeline):
    _check_spec(compiled, spec, pipeline)


@pytest.mark.parametrize("name", SPECS)
def test_spec(compiled, name):
    for pipeline in PIPELINES if name in STAGED_TOO else ("fused",):
        _check_spec(compiled, SPECS[name], pipeline)


def _check_spec(compiled, spec, pipeline):
    size = spec.block_size
    lengths = [0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1, 0, 130, 17 * size - 1]
    check(compiled(spec, pipeline), make_inputs(spec, lengths * 2))  # 20: a full chunk of 16 and a short one


@pytest.mark.scorecard(2)
@pytest.mark.parametrize(
    ("kv_heads_of", "dtype", "pipeline"),
    [
        (lambda heads: 1, "float32", "fused"),
        (lambda heads: 1, "float16", "staged"),
        (lambda heads: heads, "bfloat16", "fused"),
    ],
    ids=["one_kv_head", "one_kv_head_staged", "as_many_kv_heads"],
)
def test_every_head_count(compiled, kv_heads_of, dtype, pipeline, count, figure):
    numbers = range(count(33, 1), 66, count(65, 1))
    for num_heads in numbers:
        spec = PagedAttentionSpec(num_heads, kv_heads_of(num_heads), 16, 8, dtype)
        check(compiled(spec, pipeline), make_inputs(spec, [0, 1, 7, 8, 9, 33, 130]))
    figure("head counts", len(numbers))


@pytest.mark.scorecard(2)
@every_pipeline
@pytest.mark.parametrize("block_size", sorted(BLOCK_SIZES))
def test_every_length_to_three_blocks(compiled, block_size, pipeline, count, figure):
    base = BLOCK_SIZES[block_size]
    others = [dataclasses.replace(base, dtype="bfloat16", kv_layout="HND")]
    if block_size % 16 == 0:
        others.append(dataclasses.replace(base, dtype="float16", kv_layout="packed"))
    for spec in [base, *others[: count(0, 2)]]:
        lengths = np.random.default_rng(block_size).permutation(3 * block_size + 2)  # neighbours in a chunk differ
        check(compiled(spec, pipeline), make_inputs(spec, lengths))
        figure("lengths", len(lengths))


@pytest.mark.scorecard(2)
@every_spec
def test_every_batch_to_49(compiled, spec, pipeline, figure):
    module = compiled(spec, pipeline)
    for batch in range(50):
        lengths = np.random.default_rng(batch).integers(0, 5 * spec.block_size + 1, batch)
        check(module, make_inputs(spec, np.minimum(lengths, 40), seed=batch))
    figure("batches", 50)


@every_pipeline
@pytest.mark.parametrize("block_size", [16, 5])
def test_lengths_around_the_splits(compiled, block_size, pipeline):
    """Of one kv head and of several, whose ranges are shorter, in blocks that divide 2048 and that do not."""
    spec = BLOCK_SIZES[block_size]
    check(compiled(spec, pipeline), make_inputs(spec, [*lengths_around_the_splits(spec), 0, 1]))


@pytest.mark.parametrize("name", ["float32", "float32_MQA", "bfloat16_HND", "bfloat16_packed"])
def test_lengths_around_the_tiles(compiled, name):
    """Whole tiles may be read in another order than those that are not: every length to one and a half, and others."""
    spec, tile = SHARED[name], AVX2.kv_tile
    check(compiled(spec), make_inputs(spec, [*range(3 * tile // 2), *range(2 * tile - 9, 2 * tile + 2)]))


SWEEPS = {"kind": "llvm", "tuned": {"decode": {"sweep_intensity": 1000.0, "sweep_rows": 1024}}}
SWEPT = {
    **{dtype: {"dtype": dtype} for dtype in DTYPES},
    "window": {"dtype": "bfloat16", "window": 100, "sinks": True},
    "tiles_of_2": {"dtype": "float32", "head_tile": 2, "softcap": 5.0, "alibi": True},
    "values_of_48": {"dtype": "float16", "value_dim": 48},
    "mask": {"dtype": "bfloat16", "mask_mod": lambda batch, head, query, key: (key < 8) | (query - key < 70)},
    **{name: {"dtype": "bfloat16", "kv_dtype": name} for name in ("int8", "float8_e4m3fn", "float8_e5m2")},
    "int4": {"dtype": "float32", "kv_dtype": "int4", "kv_rotation": "none"},
}


@pytest.mark.parametrize("name", SWEPT)
def test_packed_caches_swept_with_several_rows(compiled, name):
    """Whole and partial tiles, and sequences cut into ranges, in the order of a sweep that only some cores choose."""
    spec = PagedAttentionSpec(8, 2, 64, 32, kv_layout="packed", **SWEPT[name])
    tiles = tiling.choose(spec, target.resolve(SWEEPS), "fused")
    assert tiles.strategy != "tokens_in_lanes" or (tiles.sweep, tiles.group_places > 1) == ("heads", True)
    lengths = [*range(3 * AVX2.kv_tile // 2), *lengths_around_the_splits(spec)]
    check(compiled(spec, target=SWEEPS), make_inputs(spec, lengths))


@pytest.mark.scorecard(9)
def test_131072_tokens(compiled, count, figure):
    specs = [BLOCK_SIZES[16], *SHARED.values()][: count(1, None)]
    for spec in specs:
        check(compiled(spec), make_inputs(spec, [131072, 3]))
    figure("specs at 131,072 tokens", len(specs))


@pytest.mark.slow
@pytest.mark.scorecard(9)
@parametrize(
    {
        "float32": BLOCK_SIZES[16],
        "float16": PagedAttentionSpec(2, 1, 16, 16, "float16"),
        "bfloat16_packed": PagedAttentionSpec(2, 1, 16, 16, "bfloat16", kv_layout="packed"),
        "float32_HND_sweep": PagedAttentionSpec(2, 2, 8, 16, "float32", kv_layout="HND"),
    }
)
def test_a_million_tokens(compiled, spec, pipeline, figure):
    check(compiled(spec, pipeline), make_inputs(spec, [1_000_003]))
    figure("specs at 1,000,003 tokens", 1)


@every_pipeline
@pytest.mark.parametrize(
    "scale", [None, 1, 0.1, -1.0, 0.0, -0.0, 30.0, 1e-30, np.float32(0.5), np.float64(0.3)], ids=repr
)
def test_scale(compiled, scale, pipeline):
    check(compiled(BASE, pipeline), make_inputs(BASE, [0, 1, 9, 31, 2500]), scale)


@every_pipeline
def test_sequences_may_share_blocks(compiled, pipeline):
    """A common prefix, and the same sequence twice."""
    inputs = make_inputs(BASE, [40, 37, 25, 40, 19]).take([0, 1, 2, 3, 4, 1])
    inputs.block_table[1:4, :3] = inputs.block_table[0, :3]
    inputs.block_table[5] = inputs.block_table[1]
    check(compiled(BASE, pipeline), inputs)


@every_pipeline
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


@every_pipeline
def test_inputs_are_left_alone(compiled, pipeline):
    inputs = make_inputs(BASE, [0, 3, 40, 9])
    before = [array.tobytes() for array in inputs.arguments]
    compiled(BASE, pipeline).decode(*inputs.arguments)
    assert [array.tobytes() for array in inputs.arguments] == before


@every_pipeline
def test_nothing_to_read(compiled, pipeline):
    """No sequences, no blocks, no width, and all of them at once, as a batch that has just been formed has it."""
    module = compiled(BASE, pipeline)
    check(module, make_inputs(BASE, []))
    check(module, make_inputs(BASE, [], spare_blocks=0, surplus=0))
    check(module, make_inputs(BASE, [0, 0, 0], spare_blocks=0, surplus=0))
    check(module, make_inputs(BASE, [0] * 17, surplus=0))
