"""invariant=True: a query token's out and lse have the same bits, decoded or attended from with others, in chunks."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from inputs import make_inputs
from ragged_inputs import Ragged, assert_near_float64, make_ragged
from specs import BASE, SPECS
from tolerances import assert_close_to_oracle, assert_same_bits

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.interface import AttendItem
from pa_compiler.key_ranges import attend_range_blocks

CHUNKS = (1, 2, 3, 7, 16, 33, 100)
AVX2 = {"kind": "llvm", "mcpu": "x86-64-v3"}


def bias(score, batch, head, query_pos, key_pos):
    return score + (key_pos - query_pos) * 0.01 * head


def every_third(batch, head, query_pos, key_pos):
    return (key_pos % 3 == 0) | (key_pos > query_pos - 4)


def first_and_last(batch, head, query_pos, key_pos):
    return (key_pos < 9) | (key_pos > query_pos - 40)


SCORED = {"window": 100, "softcap": 5.0, "alibi": True, "sinks": True}

INVARIANT = {
    **SPECS,
    "float32_packed": PagedAttentionSpec(8, 2, 64, 16, "float32", kv_layout="packed"),
    "float16_packed": PagedAttentionSpec(6, 1, 40, 32, "float16", kv_layout="packed"),
    "bfloat16_odd": PagedAttentionSpec(3, 1, 31, 8, "bfloat16", "float32"),
    "bfloat16_values": PagedAttentionSpec(8, 2, 64, 16, "bfloat16", value_dim=24),
    "latent": PagedAttentionSpec(32, 1, 80, 64, "bfloat16", value_dim=64, shared_kv=True),
    "window": dataclasses.replace(SPECS["bfloat16_HND"], window=20),
    "window_of_one": dataclasses.replace(BASE, window=1),
    "scored": dataclasses.replace(BASE, **SCORED),
    "packed_scored": dataclasses.replace(SPECS["bfloat16_packed"], **SCORED),
    "heads_scored": dataclasses.replace(SPECS["float32_MQA"], **SCORED),
    "functions": dataclasses.replace(BASE, score_mod=bias, mask_mod=every_third),
    "packed_functions": dataclasses.replace(SPECS["bfloat16_packed"], score_mod=bias, mask_mod=first_and_last),
}
INVARIANT = {name: dataclasses.replace(spec, invariant=True) for name, spec in INVARIANT.items()}
STAGED = ("float32", "float32_MQA", "bfloat16_packed", "latent", "scored", "packed_functions")
OF_AVX2 = ("bfloat16_packed", "float32_packed", "scored")
CASES = [pytest.param(spec, "fused", "llvm", id=name) for name, spec in INVARIANT.items()]
CASES += [pytest.param(INVARIANT[name], "staged", "llvm", id=f"{name}-staged") for name in STAGED]
CASES += [pytest.param(INVARIANT[name], "fused", AVX2, id=f"{name}-avx2") for name in OF_AVX2]


def decoded(module, ragged: Ragged):
    """(out, lse) of the query tokens of the one sequence, each decoded: all in one call, by sequences of one cache."""
    count, context = len(ragged.query), int(ragged.inputs.context_lens[0])
    table = np.repeat(ragged.inputs.block_table, count, axis=0)
    lens = np.arange(context - count, context, dtype=np.int32) + 1
    return module.decode(*ragged.arguments[:3], table, lens, return_lse=True, **ragged.inputs.heads)


def in_chunks(module, ragged: Ragged, count):
    """(out, lse) of the query tokens of the one sequence, attended to so many at a time."""
    results = [
        ragged.chunk(first, min(count, len(ragged.query) - first)).attend(module)
        for first in range(0, len(ragged.query), count)
    ]
    return tuple(np.concatenate(each) for each in zip(*results, strict=True))


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("spec", "pipeline", "target"), CASES)
def test_decoded_prefilled_and_in_chunks(compiled, spec, pipeline, target):
    """What comes after a chunk is in the cache already, and has no part in it."""
    module = compiled(spec, pipeline, target, attend=True)
    for before, count in ((0, 200), (61, 139)):
        ragged = make_ragged(spec, [(count, before + count)])
        module.num_threads = 1
        expected = ragged.attend(module)
        assert_near_float64(spec, ragged, *expected)
        for threads in (1, 2):
            module.num_threads = threads
            assert_same(decoded(module, ragged), expected)
            for chunk in CHUNKS[:: 1 if threads == 1 else 3]:
                assert_same(in_chunks(module, ragged, chunk), expected)


LONG = ("float32", "float32_MQA", "bfloat16_HND", "bfloat16_packed", "float16_packed", "scored", "packed_functions")


@pytest.mark.parametrize("spec", [INVARIANT[name] for name in LONG], ids=LONG)
def test_contexts_that_are_cut_into_ranges(compiled, spec):
    """Tokens around the ends of ranges, which several threads share and one takes in turn."""
    module, cut = compiled(spec, attend=True), attend_range_blocks(spec) * spec.block_size
    for context in (cut + 5, 2 * cut + 9):
        ragged = make_ragged(spec, [(17, context)])
        module.num_threads = 1
        expected = ragged.attend(module)
        assert_near_float64(spec, ragged, *expected)
        for threads in (1, 2, 8):
            module.num_threads = threads
            assert_same(ragged.attend(module), expected)
            assert_same(decoded(module, ragged), expected)
            for chunk in (1, 7):
                assert_same(in_chunks(module, ragged, chunk), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["float32", "float32_MQA", "bfloat16_packed", "packed_scored"])
def test_beside_any_others(compiled, name, threads):
    """Single tokens among prompts, chunks and each other, in attend and in decode."""
    spec = INVARIANT[name]
    module = compiled(spec, attend=True)
    module.num_threads = threads
    ragged = make_ragged(spec, [(60, 300)])
    expected = ragged.attend(module)
    other = make_ragged(spec, [(1, 1), (9, 40), (1, 700), (0, 8)], seed=1)
    for first, count in ((0, 1), (59, 1), (31, 1), (5, 16)):
        chunk = ragged.chunk(first, count)
        alone = chunk.attend(module)
        assert_same(alone, [each[first : first + count] for each in expected])
        beside = beside_others(chunk, other)
        assert_same([each[-count:] for each in beside.attend(module)], alone)


def beside_others(ragged: Ragged, other: Ragged) -> Ragged:
    """A call with the sequences of another one, and last the one sequence, in caches of both."""
    caches = [np.concatenate(each) for each in zip(other.arguments[1:3], ragged.arguments[1:3], strict=True)]
    blocks = len(other.arguments[1])
    width = max(each.inputs.block_table.shape[1] for each in (other, ragged))
    moved = np.where(ragged.inputs.block_table < 1 << 30, ragged.inputs.block_table + blocks, 0).astype(np.int32)
    tables = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in (other.inputs.block_table, moved)]
    inputs = ragged.inputs.replace(
        key_cache=caches[0],
        value_cache=caches[1],
        block_table=np.concatenate(tables),
        context_lens=np.concatenate([other.inputs.context_lens, ragged.inputs.context_lens]),
    )
    starts = np.concatenate([other.query_start_loc, other.query_start_loc[-1:] + len(ragged.query)])
    query = np.concatenate([other.query, ragged.query])
    return dataclasses.replace(ragged, query=query, inputs=inputs, query_start_loc=starts)


@pytest.mark.parametrize("name", ["float32", "float32_MQA", "float16", "bfloat16_packed", "packed_functions"])
def test_decode_is_near_float64(compiled, name):
    """Of all lengths, none among them, with poison in all that is not to be read; and without lse."""
    spec = INVARIANT[name]
    module = compiled(spec, attend=True)
    for poison in ("nan", "inf", "huge"):
        inputs = make_inputs(spec, [0, 1, 2, 17, 127, 128, 129, 0, 300, 4099, 5], poison=poison)
        arguments = {"out": inputs.out, **inputs.heads}
        out, lse = module.decode(*inputs.arguments, lse=inputs.lse, **arguments)
        assert_close_to_oracle(spec, inputs, out, lse)
        assert_same_bits(module.decode(*inputs.arguments, **inputs.heads), out)


@pytest.mark.parametrize("name", ["bfloat16_packed", "float32_packed", "float16_packed"])
def test_packed_is_invariant_anyway_where_it_is_not_swept(compiled, name):
    """By AMX too, which multiplies bfloat16 of both in the same steps."""
    spec, steps = INVARIANT[name], {"kind": "llvm", "tuned": {"decode": {"sweep_intensity": 0.0}}}
    modules = [compiled(dataclasses.replace(spec, invariant=given), "fused", steps, True) for given in (False, True)]
    assert modules[0].sources["asm"] == modules[1].sources["asm"]
    plans = [module.plan(np.array([3, 5000]), np.array([0, 1, 40])) for module in modules]
    assert plans[0] == plans[1]


def test_it_has_attend_whatever_is_asked(compiled):
    """Since its kernels are those of decode."""
    module = compiled(INVARIANT["float32"], attend=False)
    assert module.has_attend
    assert "fused_decode" not in module.sources["tensorir"]


def test_plan(compiled):
    module = compiled(INVARIANT["float32"], attend=True)
    module.num_threads = 1
    items = module.plan(np.array([9, 0, 300]))
    assert sorted((item.seq, item.num_query, item.first_pos) for item in items) == [(0, 1, 8), (1, 1, -1), (2, 1, 299)]
    assert all(isinstance(item, AttendItem) for item in items)
    assert module.plan(np.array([9, 300]), np.arange(3)) == module.plan(np.array([9, 300]))
    with pytest.raises(ValueError, match=r"^query_start_loc: expected up to 0 query tokens of sequence 0"):
        make_ragged(module.spec, [(1, 0)]).attend(module)


def test_it_is_a_bool_and_not_for_cuda():
    assert PagedAttentionSpec(8, 2, 64, 16, "float32", invariant=True) != PagedAttentionSpec(8, 2, 64, 16, "float32")
    with pytest.raises(TypeError, match=re.escape("invariant: expected a bool, got 1 of type int")):
        PagedAttentionSpec(8, 2, 64, 16, "float32", invariant=1)
    for pipeline in ("fused", "staged"):
        with pytest.raises(ValueError, match=r"^invariant: expected False for target cuda, got True$"):
            pa_compiler.compile(INVARIANT["latent"], "cuda", pipeline)
