"""attend_shared_prefix: beside float64, beside attend and beside itself, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ragged_inputs import assert_near_float64
from shared_prefixes import check, make_shared
from specs import BASE, SPECS
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import reference
from pa_compiler.key_ranges import attend_range_blocks
from pa_compiler.verification.inputs import as_pair

every_layout = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
MIX = [
    (9, [(1, 1), (1, 30), (3, 3), (40, 200), (1, 400), (1, 7)]),
    (0, [(1, 17), (4, 9)]),
    (1, [(2, 5)]),
    (40, [(0, 0), (1, 1), (0, 9), (17, 18), (1, 5), (1, 5)]),
]
"""(blocks of a prefix, (query tokens, own tokens) of its sequences)."""


@every_layout
def test_results_are_near_float64(compiled, spec):
    module = compiled(spec, attend=True, shared_prefix=True)
    for seed, poison in enumerate(("nan", "inf", "huge")):
        check(module, MIX[seed:] + MIX[:seed], seed=seed, poison=poison)


@every_layout
def test_one_query_token_for_each_sequence(compiled, spec):
    """As in decode: no query_start_loc, and the one prefix is a row and an int."""
    module = compiled(spec, attend=True, shared_prefix=True)
    shared = make_shared(spec, [(30, [(1, own) for own in (1, 2, 200, 16, 1)])], seed=1)
    simple = {"prefix_table": shared.prefix_table[0], "prefix_len": int(shared.prefix_len[0])}
    simple |= {"query_start_loc": None, "prefix_start_loc": None}
    out, lse = shared.attend(module, **simple)
    assert_near_float64(spec, shared.whole, out, lse)
    for one, other in zip(shared.attend(module), (out, lse), strict=True):
        assert_same_bits(one, other)


SCORED = {
    "window_within_what_is_own": {"window": 4},
    "window": {"window": 60},
    "all": {"window": 100, "softcap": 5.0, "alibi": True, "sinks": True},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("fields", SCORED.values(), ids=SCORED)
@pytest.mark.parametrize("name", ["float32", "bfloat16_packed"])
def test_windows_and_score_functions(compiled, name, fields):
    check(compiled(dataclasses.replace(SPECS[name], **fields), attend=True, shared_prefix=True), MIX)


def bias(score, batch, head, query_pos, key_pos):
    return score + (key_pos - query_pos) * 0.01 * head


def every_third(batch, head, query_pos, key_pos):
    return (key_pos % 3 == 0) | (key_pos > query_pos - 4)


def begins_late(batch, head, query_pos, key_pos):
    return key_pos >= query_pos - 50


@pytest.mark.parametrize("mask", [every_third, begins_late])
def test_functions(compiled, mask):
    check(compiled(dataclasses.replace(BASE, score_mod=bias, mask_mod=mask), attend=True, shared_prefix=True), MIX)


def by_table(score, batch, head, query_pos, key_pos, *, table):
    return score + table[head, key_pos]


def test_functions_with_inputs(compiled):
    spec = dataclasses.replace(BASE, score_mod=by_table, inputs={"table": ("float32", (6, 700))})
    module = compiled(spec, attend=True, shared_prefix=True)
    given = {"table": np.random.default_rng(0).standard_normal((6, 700), np.float32)}
    shared = make_shared(module.spec, MIX)
    whole = dataclasses.replace(shared.whole, options={"inputs": given})
    assert_near_float64(module.spec, whole, *shared.attend(module, inputs=given))


def test_keys_and_values_in_one_cache(compiled):
    check(
        compiled(
            pa_compiler.PagedAttentionSpec(16, 1, 48, 8, "bfloat16", value_dim=32, shared_kv=True),
            attend=True,
            shared_prefix=True,
        ),
        MIX,
    )


def test_ranges_of_a_prefix_and_of_what_is_own(compiled):
    size = attend_range_blocks(BASE)
    own = size * BASE.block_size
    check(
        compiled(BASE, attend=True, shared_prefix=True),
        [(2 * size + 3, [(1, 1), (2, own + 7), (1, 600)]), (size, [(1, 2)])],
    )


@pytest.mark.parametrize("fields", [{}, {"window": 2500}], ids=["all", "window"])
def test_bits_go_by_the_sequence_and_its_prefix(compiled, fields):
    """And not by the threads, the batch, the order, or the types of indices."""
    spec = dataclasses.replace(BASE, **fields)
    module, size = compiled(spec, attend=True, shared_prefix=True), attend_range_blocks(spec)
    shared = make_shared(spec, [(size + 3, [(1, 1), (40, 40), (3, 900), (1, 2600)]), (7, [(1, 9), (5, 9), (2, 30)])])
    starts, expected = shared.whole.query_start_loc, shared.attend(module)
    for threads in (1, 2, 7, 64):
        module.num_threads = threads
        for one, other in zip(shared.attend(module), expected, strict=True):
            assert_same_bits(one, other)
        for prefix, sequences in ((0, [0]), (0, [3, 1]), (0, [2]), (1, [5]), (1, [6, 4])):
            alone = shared.take(prefix, sequences).attend(module)
            rows = np.concatenate([np.arange(*starts[each : each + 2]) for each in sequences])
            for one, other in zip(alone, expected, strict=True):
                assert_same_bits(one, other[rows])


def test_bits_do_not_go_by_the_form_of_indices(compiled):
    module = compiled(BASE, attend=True, shared_prefix=True)
    shared = make_shared(BASE, MIX)
    expected = shared.attend(module)
    wide = {name: shared.arguments[name].astype(np.int64) for name in INDICES}
    pair = as_pair(shared.block_table, shared.whole.inputs.context_lens, BASE.block_size)
    for given in (wide, {"block_table": pair}, {"block_table": tuple(each.astype(np.int64) for each in pair)}):
        for one, other in zip(shared.attend(module, **given), expected, strict=True):
            assert_same_bits(one, other)


INDICES = ("prefix_table", "prefix_len", "prefix_start_loc", "block_table", "context_lens", "query_start_loc")


def test_without_a_prefix_the_bits_are_those_of_attend(compiled):
    module = compiled(BASE, attend=True, shared_prefix=True)
    for threads in (1, 8):
        module.num_threads = threads
        shared = make_shared(BASE, [(0, [(1, 1), (3, 40), (1, 700), (2, 9000), (0, 4)])])
        for one, other in zip(shared.attend(module), shared.whole.attend(module), strict=True):
            assert_same_bits(one, other)


def test_no_sequences_and_no_query_tokens(compiled):
    module = compiled(BASE, attend=True, shared_prefix=True)
    for groups in ([(3, [])], [(3, [(0, 4), (0, 0)])], [(3, []), (0, []), (2, [])]):
        out, lse = make_shared(BASE, groups).attend(module)
        assert out.shape[0] == lse.shape[0] == 0


def test_a_prefix_of_which_nothing_is_seen_is_not_looked_at(compiled):
    """Before a window, and where no sequence has query tokens; of what is seen every id is checked."""
    module = compiled(dataclasses.replace(BASE, window=20), attend=True, shared_prefix=True)  # blocks of 5
    shared = make_shared(module.spec, [(9, [(1, 12), (2, 3)]), (4, [(0, 9)])])
    expected = shared.attend(module)
    table = shared.prefix_table.copy()
    table[0, :5], table[1] = 10**9, -5  # the token at position 46 sees keys from 27 on
    for one, other in zip(shared.attend(module, prefix_table=table), expected, strict=True):
        assert_same_bits(one, other)
    table[0, 5] = 10**9
    with pytest.raises(IndexError, match=r"^prefix_table: .* got 1000000000 for prefix 0 at position 5$"):
        shared.attend(module, prefix_table=table)


def test_a_block_may_be_the_prefixs_and_a_sequences(compiled):
    """Blocks are read, and may be in any table, more than once."""
    module = compiled(BASE, attend=True, shared_prefix=True)
    shared = make_shared(BASE, [(4, [(1, 15), (2, 20)])])
    table = shared.block_table.copy()
    table[:, 4:7] = shared.prefix_table[0, [1, 1, 3]]
    whole = shared.whole.inputs.block_table.copy()
    whole[:, 4:7] = table[:, 4:7]
    expected = dataclasses.replace(shared.whole, inputs=shared.whole.inputs.replace(block_table=whole))
    assert_near_float64(BASE, expected, *shared.attend(module, block_table=table))


def test_the_reference_puts_blocks_into_rows():
    shared = make_shared(BASE, MIX)
    given, heads = shared.arguments, shared.whole.inputs.heads
    expected = reference.attend(*shared.whole.arguments, return_lse=True, **heads)
    for one, other in zip(reference.attend_shared_prefix(**given, return_lse=True, **heads), expected, strict=True):
        assert_same_bits(one, other)


def at_once(batch, head, query_pos, key_pos):
    return (key_pos < 4) | (key_pos > query_pos - 4)


def of_sequence(score, batch, head, query_pos, key_pos):
    return score + batch


def of_input(score, batch, head, query_pos, key_pos, *, each):
    return score + each[batch]


INPUTS = {"each": ("float32", ("batch",))}
REFUSED = {
    "staged": (BASE, {"pipeline": "staged"}, "False for pipeline staged, got True"),
    "cuda": (SPECS["bfloat16_HND"], {"target": "cuda"}, "False for target cuda, got True"),
    "attend": (BASE, {"attend": False}, "attend=True beside it, got attend=False"),
    "sequence": (
        dataclasses.replace(BASE, score_mod=of_sequence),
        {},
        "False for functions .* by the sequence, got True",
    ),
    "input": (
        dataclasses.replace(BASE, score_mod=of_input, inputs=INPUTS),
        {},
        "False for functions .* by the sequence",
    ),
    "intervals": (
        dataclasses.replace(BASE, mask_mod=at_once),
        {},
        "False for a mask_mod .* several intervals, got True",
    ),
}


@pytest.mark.parametrize(("spec", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_have_it_is_refused_by_name(spec, options, message):
    with pytest.raises(ValueError, match=f"^shared_prefix: expected {message}"):
        pa_compiler.compile(spec, **options, shared_prefix=True)


def test_a_module_without_it_says_so(compiled):
    module = compiled(BASE, attend=True)
    assert not module.has_attend_shared_prefix
    shared = make_shared(BASE, [(1, [(1, 1)])])
    for call in (lambda: shared.attend(module), lambda: module.plan(np.array([6]), prefix_len=5)):
        with pytest.raises(
            NotImplementedError, match=r"^attend_shared_prefix: expected .* shared_prefix=True, got one without"
        ):
            call()
