"""Bad arguments of attend_shared_prefix: each is named with both values, and nothing is written. And its plan."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import SPEC, assert_refused, over, strided, with_at
from shared_prefixes import make_shared

from pa_compiler import AttendItem, PrefixItem, WorkItem

V, T, I = ValueError, TypeError, IndexError  # noqa: E741  (a column of this table)
GROUPS = [(2, [(1, 3), (0, 4)]), (0, [(2, 9)]), (1, [(3, 3), (1, 12)])]
"""Blocks of 8 tokens: contexts of 19, 20, 9, 11 and 20, of 7 query tokens; rows of prefix_table have 4 entries."""


def module_of(compiled):
    return compiled(SPEC, attend=True, shared_prefix=True)


def good_call():
    out, lse = np.full((7, 6, 24), np.nan, np.float32), np.full((7, 6), np.nan, np.float32)
    return make_shared(SPEC, GROUPS).arguments | {"out": out, "lse": lse}


def inside_out(call, name):
    """An argument, with its values, moved into out's memory."""
    moved = over(call["out"], call[name].dtype, call[name].shape)
    moved[...] = call[name]
    return {name: moved}


def at(name, place, value):
    """What gives a good call's argument another number in one place."""
    return lambda c: {name: with_at(c[name], place, value)}


# id, error, the argument at fault, what its message also has to show, what is given in place of a good call's
BAD = [
    ("table_rank", V, "prefix_table", "[any,any] [1,3,4]", lambda c: {"prefix_table": c["prefix_table"][None]}),
    ("table_dtype", T, "prefix_table", "int32 int64 int16",
     lambda c: {"prefix_table": c["prefix_table"].astype("i2")}),
    ("table_none", T, "prefix_table", "NoneType", lambda c: {"prefix_table": None}),
    ("table_list", T, "prefix_table", "list", lambda c: {"prefix_table": c["prefix_table"].tolist()}),
    ("table_strided", V, "prefix_table", "1 2", lambda c: {"prefix_table": strided(c["prefix_table"])}),
    ("table_id", I, "prefix_table", "99 prefix 2 position 0", at("prefix_table", (2, 0), 99)),
    ("table_negative", I, "prefix_table", "-1 prefix 0 position 1", at("prefix_table", (0, 1), -1)),
    ("own_id", I, "block_table", "99 sequence 0 position 2", at("block_table", (0, 2), 99)),
    ("own_id_of_several", I, "block_table", "-2 sequence 3 position 1", at("block_table", (3, 1), -2)),
    ("own_id_int64", I, "block_table", "4294967296 sequence 4 position 2",
     lambda c: {"block_table": with_at(c["block_table"].astype(np.int64), (4, 2), 2**32)}),
    ("len_count", V, "prefix_len", "[3] [2]", lambda c: {"prefix_len": c["prefix_len"][:2]}),
    ("len_of_several", V, "prefix_len", "[3] [1]", lambda c: {"prefix_len": 16}),
    ("len_dtype", T, "prefix_len", "int32 int64 float32",
     lambda c: {"prefix_len": c["prefix_len"].astype(np.float32)}),
    ("len_float", T, "prefix_len", "16.0 float", lambda c: {"prefix_len": 16.0}),
    ("len_none", T, "prefix_len", "None", lambda c: {"prefix_len": None}),
    ("len_negative", V, "prefix_len", "0 32 prefix 1 -8", at("prefix_len", 1, -8)),
    ("len_beyond_its_row", V, "prefix_len", "0 32 prefix 0 40", at("prefix_len", 0, 40)),
    ("len_int64", V, "prefix_len", "0 32 prefix 0 4294967312",
     lambda c: {"prefix_len": with_at(c["prefix_len"].astype(np.int64), 0, 2**32 + 16)}),
    ("len_not_of_blocks", V, "prefix_len", "8 prefix 0 17", at("prefix_len", 0, 17)),
    ("longer_than_a_sequence", V, "context_lens", "25 sequence 0 24 prefix 0 19", at("prefix_len", 0, 24)),
    ("as_long_as_a_sequence", V, "context_lens", "17 sequence 0 16 1 16", at("context_lens", 0, 16)),
    ("queries_within_the_prefix", V, "context_lens", "11 sequence 3 8 3 prefix 2 10", at("context_lens", 3, 10)),
    ("context_beyond_its_row", V, "context_lens", "sequence 1 999", at("context_lens", 1, 999)),
    ("groups_none", V, "prefix_start_loc", "None 3", lambda c: {"prefix_start_loc": None}),
    ("groups_count", V, "prefix_start_loc", "[4] [3]", lambda c: {"prefix_start_loc": c["prefix_start_loc"][1:]}),
    ("groups_late", V, "prefix_start_loc", "0 1", at("prefix_start_loc", 0, 1)),
    ("groups_fall", V, "prefix_start_loc", "1 2 position 2", at("prefix_start_loc", 2, 1)),
    ("groups_end", V, "prefix_start_loc", "5 4", at("prefix_start_loc", 3, 4)),
    ("groups_beyond", V, "prefix_start_loc", "5 6 position 3", at("prefix_start_loc", 3, 6)),
    ("starts_none", V, "query_start_loc", "None 7 5", lambda c: {"query_start_loc": None}),
    ("starts_end", V, "query_start_loc", "7 6", at("query_start_loc", 5, 6)),
    ("starts_fall", V, "query_start_loc", "1 0 position 2", at("query_start_loc", 2, 0)),
    ("out_dtype", T, "out", "float32 float16", lambda c: {"out": c["out"].astype(np.float16)}),
    ("out_over_prefix", V, "out", "prefix_table", lambda c: inside_out(c, "prefix_table")),
    ("out_over_len", V, "out", "prefix_len", lambda c: inside_out(c, "prefix_len")),
    ("out_over_groups", V, "out", "prefix_start_loc", lambda c: inside_out(c, "prefix_start_loc")),
    ("out_over_starts", V, "out", "query_start_loc", lambda c: inside_out(c, "query_start_loc")),
    ("scale", V, "scale", "inf", lambda c: {"scale": float("inf")}),
    ("check", V, "check", "'host' 'device'", lambda c: {"check": "device"}),
    ("sinks", T, "sinks", "sinks", lambda c: {"sinks": np.zeros(6, np.float32)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "argument", "shows", "change"), [each[1:] for each in BAD], ids=[each[0] for each in BAD]
)
def test_bad_arguments(compiled, error, argument, shows, change):
    module, call = module_of(compiled), good_call()
    arguments = call | change(call)
    arrays = [array for array in (*call.values(), *arguments.values()) if isinstance(array, np.ndarray)]
    assert_refused(lambda: module.attend_shared_prefix(**arguments), error, argument, shows, arrays)


def test_the_good_call_is_good(compiled):
    call = good_call()
    module_of(compiled).attend_shared_prefix(**call)
    assert np.isfinite(call["out"]).all()
    assert np.isfinite(call["lse"]).all()


def test_the_plan_has_each_block_once(compiled):
    """The prefix's for all of its query tokens, the others for each sequence, and what is before them in none."""
    module = module_of(compiled)
    call = good_call()
    given = {name: call[name] for name in ("context_lens", "query_start_loc", "prefix_len", "prefix_start_loc")}
    for threads in (1, 8):
        module.num_threads = threads
        plan = module.plan(**given)
        assert plan == module.plan(**{name: array.astype(np.int64) for name, array in given.items()})
        seen = {}
        for item in plan:
            if isinstance(item, WorkItem):
                of, heads = [("own", item.batch_start + i) for i in range(item.num_seqs)], range(SPEC.num_kv_heads)
            else:
                of = [("own", item.seq) if isinstance(item, AttendItem) else ("prefix", item.prefix)]
                heads = range(item.kv_head_begin, item.kv_head_begin + item.num_kv_heads)
            for key in (
                (each, head, block)
                for each in of
                for head in heads
                for block in range(item.block_begin, item.block_end)
            ):
                assert key not in seen
                seen[key] = item
        blocks = {("prefix", 0): (0, 2), ("prefix", 2): (0, 1)}
        blocks |= {("own", 0): (2, 3), ("own", 2): (0, 2), ("own", 3): (1, 2), ("own", 4): (1, 3)}
        expected = {
            (of, head, at) for of, ends in blocks.items() for head in range(SPEC.num_kv_heads) for at in range(*ends)
        }
        assert seen.keys() == expected
        tokens = {item.prefix: (item.token_begin, item.num_query) for item in plan if isinstance(item, PrefixItem)}
        assert tokens == {0: (0, 1), 2: (3, 4)}
    one = module.plan(np.array([17, 30]), prefix_len=16)
    assert [type(item) for item in one] == [PrefixItem, WorkItem]


def test_a_long_prefix_is_divided_among_threads(compiled):
    module = module_of(compiled)
    module.num_threads = 8
    plan = module.plan(np.full(4, 20000), prefix_len=19992)
    items = [item for item in plan if isinstance(item, PrefixItem)]
    assert len(items) > 8
    assert len({item.block_begin for item in items}) > 1
    assert {item.num_query for item in items} == {4}


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (V, "prefix_len: expected whole blocks of 8 tokens for prefix 0, got 9 tokens", {"prefix_len": 9}),
        (
            V,
            "context_lens: expected at least 25 for sequence 0, 24 tokens of prefix 0 and 1 .*, got 17",
            {"prefix_len": 24},
        ),
        (T, "prefix_start_loc: expected None without prefix_len", {"prefix_start_loc": np.array([0, 2])}),
    ],
)
def test_bad_arguments_of_the_plan(compiled, error, message, given):
    with pytest.raises(error, match=f"^{message}"):
        module_of(compiled).plan(np.array([17, 30]), **given)
