"""alibi_slopes, sinks and window in calls: what is taken, what is refused, and which block ids are looked at."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_driver import OnGpu
from dlpack import CUDA, Exported
from inputs import make_inputs
from refusals import (
    LENGTHS,
    SPEC,
    assert_refused,
    bytes_of,
    decode_call,
    misaligned,
    nowhere,
    over,
    read_only,
    strided,
    with_at,
)
from specs import every_pipeline, every_spec, range_tokens
from test_arrays import as_torch
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec
from pa_compiler.key_ranges import decodes_in_step, split_blocks

SCORED = dataclasses.replace(SPEC, alibi=True, sinks=True)
WINDOWED = dataclasses.replace(SPEC, window=6)
"""Of blocks of 8 tokens; of a sequence of 20 tokens the first block is hidden."""

FIELDS = {"alibi_slopes": "alibi", "sinks": "sinks"}

every_argument = pytest.mark.parametrize("argument", FIELDS)


def scored_call():
    call = decode_call()
    call.alibi_slopes = np.linspace(0.5, 0.01, 6, dtype=np.float32)
    call.sinks = np.linspace(-1, 2, 6, dtype=np.float32)
    return call


V, T, I = ValueError, TypeError, IndexError  # noqa: E741  (a column of this table)

# id, error, what the message also has to show, what is given in place of a good call's array
BAD = [
    ("missing", T, "None", lambda heads: None),
    ("rank_0", V, "[6] []", lambda heads: heads[0, ...]),
    ("rank_2", V, "[6] [1,6]", lambda heads: heads[None]),
    ("a_head_less", V, "[6] [5]", lambda heads: heads[:5]),
    ("none_of_them", V, "[6] [0]", lambda heads: heads[:0]),
    ("float64", T, "float32 float64", lambda heads: heads.astype(np.float64)),
    ("float16", T, "float32 float16", lambda heads: heads.astype(np.float16)),
    ("int32", T, "float32 int32", lambda heads: heads.view(np.int32)),
    ("big_endian", T, "float32", lambda heads: heads.astype(">f4")),
    ("masked", T, "mask filled()", np.ma.masked_array),
    ("list", T, "list", lambda heads: heads.tolist()),
    ("number", T, "float", lambda heads: 0.5),
    ("stride", V, "1 2", strided),
    ("reversed", V, "1 -1", lambda heads: heads[::-1]),
    ("broadcast", V, "1 0", lambda heads: np.broadcast_to(heads[:1], 6)),
    ("misaligned", V, "4", misaligned),
    ("without_memory", V, "memory", nowhere),
    ("on_gpu", V, "1 2", lambda heads: Exported(heads, device=CUDA)),
]


@pytest.mark.scorecard(13)
@every_argument
@pytest.mark.parametrize(("error", "shows", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_refused_before_anything_is_written(compiled, figure, argument, error, shows, change):
    good = scored_call()
    wrong = change(getattr(good, argument))
    call = {**vars(good), argument: wrong}
    assert_refused(lambda: compiled(SCORED).decode(**call), error, argument, shows, [*vars(good).values(), wrong])
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@every_argument
def test_missing_says_what_the_spec_has(compiled, figure, argument):
    call = vars(scored_call()) | {argument: None}
    with pytest.raises(TypeError, match=rf"^{argument}: expected an array, since the spec has {FIELDS[argument]}, got"):
        compiled(SCORED).decode(**call)
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@every_argument
@pytest.mark.parametrize("given", [np.array, Exported, np.ndarray.tolist, lambda heads: heads[:2], as_torch])
def test_given_for_nothing(compiled, figure, argument, given):
    """Of whatever kind and shape, where the spec has the other one alone."""
    (other,) = FIELDS.keys() - {argument}
    spec = dataclasses.replace(SPEC, **{FIELDS[other]: True})
    good = scored_call()
    call = vars(good) | {argument: given(getattr(good, argument))}
    shows = f"None no {FIELDS[argument]}"
    assert_refused(lambda: compiled(spec).decode(**call), TypeError, argument, shows, vars(good).values())
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@every_argument
@pytest.mark.parametrize("written", ["out", "lse"])
def test_written_over_is_refused(compiled, figure, argument, written):
    good = scored_call()
    moved = over(getattr(good, written), np.float32, (6,))
    call = vars(good) | {argument: moved}
    assert_refused(lambda: compiled(SCORED).decode(**call), ValueError, written, argument, vars(good).values())
    figure("kinds", 1)


@every_argument
def test_both_may_be_one_array_beside_out(compiled, argument):
    """Inputs may share memory, and lie right before what is written."""
    call = scored_call()
    room = np.zeros(6 + call.out.size, np.float32)
    room[:6] = getattr(call, argument)
    call.alibi_slopes = call.sinks = room[:6]
    call.out = room[6:].reshape(call.out.shape)
    compiled(SCORED).decode(**vars(call))
    assert np.isfinite(call.out).all()
    assert_same_bits(room[:6], getattr(scored_call(), argument))


KINDS = {
    "read_only": read_only,
    "view": lambda heads: np.concatenate([heads, heads, heads])[6:12],
    "column": lambda heads: np.stack([heads, heads])[1],
    "dlpack": Exported,
    "torch": as_torch,
}


@every_pipeline
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds_of_arrays(compiled, pipeline, kind):
    call, again = scored_call(), scored_call()
    module = compiled(SCORED, pipeline)
    module.decode(**vars(call))
    module.decode(**vars(again) | {name: kind(getattr(again, name)) for name in FIELDS})
    assert_same_bits(again.out, call.out)
    assert_same_bits(again.lse, call.lse)


# id, what the message also has to show, the block table in place of a good call's
BAD_IDS = [
    ("minus_1", "-1 10 2 1", lambda table: with_at(table, (2, 1), -1)),
    ("too_large", "10 2 2", lambda table: with_at(table, (2, 2), 10)),
    ("int64", f"{2**40} 10 2 1", lambda table: with_at(table.astype(np.int64), (2, 1), 2**40)),
    ("of_a_short_sequence", "-9 10 0 0", lambda table: with_at(table, (0, 0), -9)),
    ("behind_a_hidden_one", "99 10 2 2", lambda table: with_at(with_at(table, (2, 0), -1), (2, 2), 99)),
]


@pytest.mark.scorecard(13)
@every_pipeline
@pytest.mark.parametrize(("shows", "change"), [row[1:] for row in BAD_IDS], ids=[row[0] for row in BAD_IDS])
def test_block_ids_in_the_window_are_checked(compiled, figure, pipeline, shows, change):
    good = decode_call()
    call = vars(good) | {"block_table": change(good.block_table)}
    module = compiled(WINDOWED, pipeline)
    assert_refused(lambda: module.decode(**call), IndexError, "block_table", shows, vars(good).values())
    figure("kinds", 1)


@pytest.mark.parametrize("garbage", [-1, 10, 2**31 - 1, -(2**31), 2**40, -(2**63)])
@every_pipeline
def test_block_ids_before_the_window_may_be_anything(compiled, pipeline, garbage):
    """A sequence by itself, whose first 100 blocks have been freed."""
    inputs, module = make_inputs(SPEC, [813]), compiled(WINDOWED, pipeline)
    expected = module.decode(*inputs.arguments, return_lse=True)
    table = inputs.block_table.astype(np.int64)
    if -(2**31) <= garbage < 2**31:
        table = inputs.block_table.copy()
    table[:, :100] = garbage
    freed = inputs.replace(block_table=table)
    before = bytes_of(freed.arguments)
    for found, right in zip(module.decode(*freed.arguments, return_lse=True), expected, strict=True):
        assert_same_bits(found, right)
    assert bytes_of(freed.arguments) == before
    with pytest.raises(IndexError, match=r"^block_table: .* for sequence 0 at position 100$"):
        module.decode(*freed.replace(block_table=with_at(table, (0, 100), -1)).arguments)


@every_spec
def test_a_window_is_as_a_context_that_begins_with_it(compiled, spec, pipeline):
    """Where it begins with a block: the same bits, from the same ranges, whatever the blocks before hold.

    Where ranges lie at fixed positions, it begins with one of them.
    """
    window = 3 * range_tokens(spec) - spec.block_size
    windowed, plain = compiled(dataclasses.replace(spec, window=window), pipeline), compiled(spec, pipeline)
    unit = split_blocks(spec) if pipeline == "fused" and decodes_in_step(spec) else 1
    for hidden in (unit, 7 * unit):
        inputs = make_inputs(spec, [window + hidden * spec.block_size], spare_blocks=0)
        table = inputs.block_table.copy()
        for block in table[0, :hidden]:
            inputs.key_cache[block] = inputs.value_cache[block] = np.nan
        table[0, :hidden] = -1
        shorter = inputs.replace(block_table=table[:, hidden:].copy(), context_lens=np.array([window], np.int32))
        expected = plain.decode(*shorter.arguments, return_lse=True)
        found = windowed.decode(*inputs.replace(block_table=table).arguments, return_lse=True)
        for one, other in zip(found, expected, strict=True):
            assert np.isfinite(one.astype(np.float32)).all()
            assert_same_bits(one, other)


ON_GPU = PagedAttentionSpec(8, 2, 64, 16, "bfloat16")


@every_argument
def test_a_gpu_refuses_them(gpu, gpu_module, argument):
    """Its specs have neither."""
    call = OnGpu(gpu, make_inputs(ON_GPU, LENGTHS))
    expected = rf"^{argument}: expected None, since the spec has no {FIELDS[argument]}, got an array of shape \[8\]$"
    with pytest.raises(TypeError, match=expected):
        call.decode(gpu_module(ON_GPU), **{argument: np.zeros(8, np.float32)})
    gpu.run()
    assert gpu.launches() == []
