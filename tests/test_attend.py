"""attend: any number of query tokens per sequence, beside float64 and beside itself, bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ragged_inputs import assert_near_float64, drawn_trees, make_ragged
from specs import BASE, SPECS
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import reference
from pa_compiler.key_ranges import attend_range_blocks

every_layout = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
MIX = [(1, 1), (0, 9), (2, 2), (7, 100), (1, 300), (16, 129), (33, 128), (1, 7), (17, 255), (3, 0 + 3)]
"""(query tokens, context): single tokens beside others and each other, contexts around the ends of tiles."""


def check(module, sequences, **options):
    ragged = make_ragged(module.spec, sequences, **options)
    out, lse = ragged.attend(module)
    assert_near_float64(module.spec, ragged, out, lse)


@every_layout
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
def test_results_are_near_float64(compiled, spec, causal):
    module = compiled(spec, attend=True)
    for seed, poison in enumerate(("nan", "inf", "huge")):
        check(module, MIX[seed:] + MIX[:seed], seed=seed, poison=poison, causal=causal)


@every_layout
def test_contexts_around_the_ends_of_blocks_and_tiles(compiled, spec):
    module = compiled(spec, attend=True)
    ends = sorted({end + offset for end in (spec.block_size, 16, 128, 256) for offset in (-1, 0, 1)} - {0})
    for count in (2, 5, 33):
        check(module, [(min(count, length), length) for length in ends])


@every_layout
def test_a_prompt(compiled, spec):
    check(compiled(spec, attend=True), [(512, 512), (70, 513)], index=np.int64)


def test_a_context_of_several_ranges(compiled):
    cut = attend_range_blocks(BASE) * BASE.block_size
    check(compiled(BASE, attend=True), [(3, cut - 1), (2, cut + 1), (16, 2 * cut + 1)])


@every_layout
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_trees(compiled, spec, dtype):
    rng = np.random.default_rng(0)
    sequences = [(8, 8), (1, 40), (9, 100), (1, 1), (0, 5), (40, 300), (1, 6), (2, 2)]
    mask = drawn_trees([count for count, _ in sequences], rng).astype(dtype) * dtype(3)
    check(compiled(spec, attend=True), sequences, tree_mask=mask)


SCORED = {
    "window": {"window": 20},
    "window_of_one": {"window": 1},
    "all": {"window": 100, "softcap": 5.0, "alibi": True, "sinks": True},
}


@pytest.mark.parametrize("fields", SCORED.values(), ids=SCORED)
@pytest.mark.parametrize("name", ["float32", "bfloat16_packed"])
def test_windows_and_score_functions(compiled, name, fields):
    module = compiled(dataclasses.replace(SPECS[name], **fields), attend=True)
    check(module, MIX)
    check(module, [(40, 200), (2, 5)], causal=False)
    check(module, [(5, 30), (1, 3)], tree_mask=drawn_trees([5, 1], np.random.default_rng(1)))


def bias(score, batch, head, query_pos, key_pos):
    return score + (key_pos - query_pos) * 0.01 * head


def every_third(batch, head, query_pos, key_pos):
    return (key_pos % 3 == 0) | (key_pos > query_pos - 4)


def test_functions(compiled):
    module = compiled(dataclasses.replace(BASE, score_mod=bias, mask_mod=every_third), attend=True)
    check(module, MIX)


def test_a_score_function_alone_takes_every_call(compiled):
    module = compiled(dataclasses.replace(BASE, score_mod=bias), attend=True)
    check(module, [(40, 200), (2, 5)], causal=False)
    check(module, [(5, 30), (1, 3)], tree_mask=drawn_trees([5, 1], np.random.default_rng(1)))


@pytest.mark.parametrize("threads", [1, 8])
def test_the_last_key_of_a_mask_is_in_a_later_range(compiled, threads):
    cut = attend_range_blocks(BASE) * BASE.block_size
    module = compiled(dataclasses.replace(BASE, mask_mod=lambda b, h, q, k: k < cut + 9), attend=True)
    module.num_threads = threads
    items = module.plan(np.array([9 * cut]), np.array([0, 2]))
    assert len({item.block_begin for item in items}) == 1 + (threads > 1)
    check(module, [(2, 9 * cut)])


def by_table(score, batch, head, query_pos, key_pos, *, table):
    return score + table[head, key_pos]


def of_sequence(batch, head, query_pos, key_pos, *, first):
    return key_pos >= first[batch]


def test_functions_with_inputs(compiled):
    inputs = {"table": ("float32", (6, 300)), "first": ("int32", ("batch",))}
    module = compiled(dataclasses.replace(BASE, score_mod=by_table, mask_mod=of_sequence, inputs=inputs), attend=True)
    rng = np.random.default_rng(0)
    given = {"table": rng.standard_normal((6, 300), np.float32), "first": np.arange(len(MIX), dtype=np.int32)}
    ragged = make_ragged(module.spec, MIX)
    ragged = dataclasses.replace(ragged, options={"inputs": given})
    assert_near_float64(module.spec, ragged, *ragged.attend(module))


def by_head_and_sequence(score, batch, head, query_pos, key_pos, *, tilt):
    return score + tilt[head, batch, 1] * 0.1 * (key_pos - query_pos)


@pytest.mark.parametrize(
    ("pipeline", "fields"),
    [("fused", {}), ("fused", {"kv_dtype": "int8"}), ("fused", {"invariant": True}), ("staged", {})],
    ids=["fused", "codes", "invariant", "staged"],
)
def test_an_input_with_the_batch_in_a_later_extent(compiled, pipeline, fields):
    """The batch is that of sequences, for those of a single query token too, beside which there are other tokens."""
    inputs = {"tilt": ("float32", (6, "batch", 2))}
    spec = dataclasses.replace(BASE, score_mod=by_head_and_sequence, inputs=inputs, **fields)
    module = compiled(spec, pipeline, attend=True)
    given = {"tilt": np.random.default_rng(0).standard_normal((6, len(MIX), 2), np.float32)}
    ragged = make_ragged(spec, MIX)
    ragged = dataclasses.replace(ragged, options={"inputs": given})
    assert_near_float64(spec, ragged, *ragged.attend(module))


@every_layout
@pytest.mark.parametrize("window", [None, 50])
def test_one_query_token_each_is_decode(compiled, spec, window):
    module = compiled(dataclasses.replace(spec, window=window), attend=True)
    lengths = [5000, 1, 17, 2049, 33, 40, 1, 129, 7, 4099, *range(1, 20)]
    ragged = make_ragged(module.spec, [(1, length) for length in lengths])
    expected = module.decode(ragged.query, *ragged.inputs.arguments[1:], return_lse=True)
    for threads in (1, 3):
        module.num_threads = threads
        for one, other in zip(ragged.attend(module), expected, strict=True):
            assert_same_bits(one, other)


@every_layout
def test_single_query_tokens_between_others_are_decode(compiled, spec):
    module = compiled(spec, attend=True)
    ragged = make_ragged(spec, MIX)
    out, lse = ragged.attend(module)
    for sequence in np.flatnonzero(np.array(ragged.counts) == 1):
        token = ragged.query_start_loc[sequence]
        inputs = ragged.inputs.take([sequence])
        alone = module.decode(ragged.query[[token]], *inputs.arguments[1:], return_lse=True)
        assert_same_bits(out[[token]], alone[0])
        assert_same_bits(lse[[token]], alone[1])


CHUNKS = {"halves": [350, 350], "two_first": [2, 698], "hundreds": [100] * 7, "odd": [129, 3, 77, 491]}


@every_layout
@pytest.mark.parametrize("before", [0, 37], ids=["a_prompt", "after_a_context"])
def test_a_prompt_in_chunks(compiled, spec, before):
    """The cache is full from the first chunk on: what comes after a chunk has no part in it."""
    module = compiled(spec, attend=True)
    ragged = make_ragged(spec, [(700, 700 + before)])
    expected = ragged.attend(module)
    for chunks in CHUNKS.values():
        first = 0
        for count in chunks:
            for one, whole in zip(ragged.chunk(first, count).attend(module), expected, strict=True):
                assert_same_bits(one, whole[first : first + count])
            first += count


@every_layout
def test_threads(compiled, spec):
    """Long contexts are cut into ranges where there are threads for them, and heads are divided."""
    module = compiled(spec, attend=True)
    cut = attend_range_blocks(spec) * spec.block_size
    ragged = make_ragged(spec, [*MIX, (3, cut + 100), (100, 400), (2, 2 * cut)])
    module.num_threads = 1
    expected = ragged.attend(module)
    for threads in (2, 4, 8, 1):
        module.num_threads = threads
        for one, other in zip(ragged.attend(module), expected, strict=True):
            assert_same_bits(one, other)


@every_layout
def test_alone_and_in_a_batch(compiled, spec):
    module = compiled(spec, attend=True)
    ragged = make_ragged(spec, [*MIX, (512, 600)])
    out, lse = ragged.attend(module)
    for sequence, (begin, end) in enumerate(zip(ragged.query_start_loc, ragged.query_start_loc[1:], strict=False)):
        alone = ragged.take([sequence]).attend(module)
        assert_same_bits(alone[0], out[begin:end])
        assert_same_bits(alone[1], lse[begin:end])
    order = np.random.default_rng(0).permutation(len(MIX))
    for one, other in zip(ragged.take(order).attend(module), (out, lse), strict=True):
        rows = [np.arange(*ragged.query_start_loc[each : each + 2]) for each in order]
        assert_same_bits(one, other[np.concatenate(rows)])


@every_layout
def test_what_comes_later_has_no_part(compiled, spec):
    """Whatever the keys and values of later tokens are, NaN among them."""
    module = compiled(spec, attend=True)
    ragged = make_ragged(spec, [(40, 60)])
    expected = ragged.attend(module)
    spoiled = [cache.copy() for cache in ragged.arguments[1:3]]
    table, size = ragged.inputs.block_table[0], spec.block_size
    later = dataclasses.replace(spec, kv_layout="NHD")
    keys, values = pa_compiler.convert_cache(*spoiled, spec.kv_layout, later.kv_layout)
    for position in range(50, 60):
        for cache in (keys, values):
            cache[table[position // size], position % size] = np.nan
    keys, values = pa_compiler.convert_cache(keys, values, later.kv_layout, spec.kv_layout)
    changed = dataclasses.replace(ragged, inputs=ragged.inputs.replace(key_cache=keys, value_cache=values))
    for one, other in zip(changed.attend(module), expected, strict=True):
        assert_same_bits(one[:30], other[:30])
        assert np.isnan(one[30:].astype(np.float32)).all()


def test_no_query_tokens(compiled):
    module = compiled(BASE, attend=True)
    for sequences in ([], [(0, 5)], [(0, 0), (0, 9)]):
        out, lse = make_ragged(BASE, sequences).attend(module)
        assert out.shape == (0, 6, 24)
        assert lse.shape == (0, 6)


def test_out_is_made_like_query(compiled):
    module, ragged = compiled(BASE, attend=True), make_ragged(BASE, [(3, 5), (1, 2)])
    out = module.attend(*ragged.arguments)
    expected = reference.attend(*ragged.arguments)
    assert (out.shape, out.dtype) == ((4, 6, 24), np.float32)
    assert np.abs(out - expected).max() < 1e-5
    flat = np.empty((4, 6 * 24), np.float32)
    assert module.attend(*ragged.arguments, None, flat) is flat
    assert_same_bits(flat.reshape(out.shape), out)
    with_lse = module.attend(*ragged.arguments, return_lse=True)
    assert len(with_lse) == 2
    assert_same_bits(with_lse[0], out)


def test_not_every_module_has_it(compiled):
    module, ragged = compiled(BASE), make_ragged(BASE, [(3, 5)])
    assert not module.has_attend
    message = r"^attend: expected a module compiled with attend=True, got one compiled with attend=False$"
    with pytest.raises(NotImplementedError, match=message):
        module.attend(*ragged.arguments)
    with pytest.raises(NotImplementedError, match=r"^attend: "):
        module.plan(np.array([5]), np.array([0, 3]))


def test_elements_of_a_head_of_which_few_tokens_fill_a_tile(compiled):
    compiled(pa_compiler.PagedAttentionSpec(2, 1, 2048, 16, "float32")).verify(2, seed=1)
