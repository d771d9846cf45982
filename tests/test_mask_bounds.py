"""Bounds of masks: against the masks themselves, asked for every key of many lengths, and in compiled libraries."""

from __future__ import annotations

import dataclasses
import operator
import random

import numpy as np
import pytest
from inputs import make_inputs
from specs import BASE, SPECS, every_pipeline
from tolerances import assert_close_to_oracle

from pa_compiler import score_text
from pa_compiler.bounds import MOST_INTERVALS, NO_KEYS, affine, bounds, in_words, residual_mask
from pa_compiler.score import Function, Term
from pa_compiler.verification.inputs import needed_entries

QUERY, KEY, HEAD = (Term(name, "int32") for name in ("query_pos", "key_pos", "head"))
LENGTHS = np.array([*range(1, 20), 31, 32, 33, 50, 63, 64, 65, 66, 100, 127, 128, 129, 191, 192, 193, 256, 300])

MASKS = {  # with what is said of them: words, and whether they are nothing else than their bounds
    "last": (lambda b, h, q, k: q - k < 100, "query_pos - 99 .. query_pos", True),
    "causal": (lambda b, h, q, k: k <= q, "0 .. query_pos", True),
    "first": (lambda b, h, q, k: k < 7, "0 .. 6", True),
    "first_and_last": (
        lambda b, h, q, k: (k < 4) | (q - k < 150),
        "0 .. 3 and query_pos - 149 .. query_pos",
        True,
    ),
    "three": (
        lambda b, h, q, k: (k < 4) | (q - k < 70) | (k // 50 == 3),
        "0 .. 3 and 150 .. 199 and query_pos - 69 .. query_pos",
        True,
    ),
    "chunk": (lambda b, h, q, k: k // 64 == q // 64, "64 * (query_pos // 64) .. query_pos", True),
    "two_chunks": (lambda b, h, q, k: q // 32 - k // 32 < 2, "32 * (query_pos // 32) - 32 .. query_pos", True),
    "late": (lambda b, h, q, k: k > 30, "31 .. query_pos", True),
    "middle": (lambda b, h, q, k: (k >= 5) & (k + 33 < q), "5 .. query_pos - 34", True),
    "far": (lambda b, h, q, k: abs(q - k) >= 40, "0 .. query_pos - 40", True),
    "halves": (lambda b, h, q, k: 2 * k >= q, "((query_pos + 1) // 2) .. query_pos", True),
    "some_heads": (lambda b, h, q, k: (q - k < 50) & (h % 2 == 0), "query_pos - 49 .. query_pos", False),
    "dilated": (lambda b, h, q, k: (q - k < 50) & ((q - k) % 3 == 0), "query_pos - 49 .. query_pos", False),
    "prefix": (lambda b, h, q, k: (k <= q) | (k < h), "0 .. query_pos", True),
    "never": (lambda b, h, q, k: k > q, "", True),
}

OPERATIONS = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "negative": operator.neg,
    "absolute": np.abs,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "less": operator.lt,
    "less_equal": operator.le,
    "equal": operator.eq,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "where": np.where,
}


def evaluated(term, arguments):
    """A term by NumPy, in int64."""
    if term.op == "number":
        return term.value
    if term.op in arguments:
        return arguments[term.op]
    return OPERATIONS[term.op](*(evaluated(each, arguments) for each in term.args))


def asked(term, lengths, query_ends):
    """A mask for every head, length and key: bool [3, lengths, keys], False beyond the lengths."""
    keys, lengths = np.arange(LENGTHS.max()), lengths[:, None]
    arguments = {"head": np.array([0, 1, 3])[:, None, None], "query_pos": query_ends[:, None] - 1, "key_pos": keys}
    return np.broadcast_to(evaluated(term, arguments), (3, len(lengths), len(keys))) & (keys < lengths)


def between(intervals, lengths, query_ends):
    """Which keys are in a union of intervals, and which are from the first to the last of these: [lengths, keys]."""
    keys, inside = np.arange(LENGTHS.max()), np.zeros((len(lengths), LENGTHS.max()), bool)
    operations = affine.Operations(minimum=np.minimum, maximum=np.maximum)
    for interval in intervals:
        begin, end = (affine.value(each, lengths[:, None], operations, query_ends[:, None]) for each in interval)
        inside |= (keys >= begin) & (keys < np.minimum(end, lengths[:, None]))
    hull = np.maximum.accumulate(inside, axis=1) & np.maximum.accumulate(inside[:, ::-1], axis=1)[:, ::-1]
    return inside, hull


def check_bounds(spec):
    """The bounds of a mask have all keys that it leaves, and what is left to be asked makes up for the others.

    For query tokens that are the last of their sequence, and for any.
    """
    check_places(spec, False, LENGTHS, LENGTHS)
    lengths, query_ends = np.array([(length, end) for length in LENGTHS[::3] for end in LENGTHS if end <= length]).T
    check_places(spec, True, lengths, query_ends)


def check_places(spec, many_tokens, *places):
    found, residual, mask = bounds(spec, many_tokens), residual_mask(spec, many_tokens), spec.mask_mod.result
    assert 1 <= len(found.intervals) <= MOST_INTERVALS
    assert all(affine.fits(end) for interval in found.intervals for end in interval)
    inside, hull = between(found.intervals, *places)
    seen = asked(mask, *places) & (np.arange(LENGTHS.max()) >= places[1][:, None] - (spec.window or LENGTHS.max()))
    assert not (seen & ~inside).any()
    if found.exact:
        np.testing.assert_array_equal(seen, np.broadcast_to(inside, seen.shape))
    left = hull if residual is None else hull & asked(residual, *places)
    np.testing.assert_array_equal(seen, np.broadcast_to(left, seen.shape))


def masked(spec, name, **fields):
    return dataclasses.replace(spec, mask_mod=MASKS[name][0], **fields)


@pytest.mark.parametrize("name", MASKS)
def test_what_bounds_say(name):
    spec = masked(BASE, name)
    found = bounds(spec)
    assert " and ".join(each.text() for each in found.intervals if each != NO_KEYS) == MASKS[name][1]
    assert found.exact == MASKS[name][2]
    check_bounds(spec)
    for window in (1, 60):
        check_bounds(dataclasses.replace(spec, window=window))


def test_in_words():
    assert in_words(masked(BASE, "never")) == "none: the mask is never True"
    assert in_words(masked(BASE, "chunk")).endswith("; nothing is left of the mask")
    assert in_words(masked(BASE, "dilated")).endswith("; what is left of the mask is asked of each of these")


def test_a_conjunction_is_asked_without_what_bounds_say():
    residual = residual_mask(masked(BASE, "dilated"))
    assert score_text.text(residual) == score_text.text(
        dataclasses.replace(BASE, mask_mod=lambda b, h, q, k: (q - k) % 3 == 0).mask_mod.result
    )


def test_a_window_is_what_it_is_as_a_mask():
    assert bounds(dataclasses.replace(BASE, window=100)) == bounds(masked(BASE, "last"))


def drawn_integer(rng, depth):
    leaves = [QUERY, KEY, KEY, HEAD, Term("number", "int32", value=rng.randint(-70, 130))]
    if depth == 0:
        return rng.choice(leaves)
    op = rng.choice(["add", "subtract", "negative", "absolute", "minimum", "maximum", "multiply", "divide", "where"])
    first, second = drawn_integer(rng, depth - 1), drawn_integer(rng, depth - 1)
    if op == "where":
        return Term(op, "int32", (drawn_condition(rng, depth - 1), first, second))
    if op in ("multiply", "divide"):
        second = Term("number", "int32", value=rng.randint(-4, 4) if op == "multiply" else rng.randint(1, 70))
        op = rng.choice(["floor_divide", "remainder"]) if op == "divide" else op
    return Term(op, "int32", (first,) if op in ("negative", "absolute") else (first, second))


def drawn_condition(rng, depth):
    if depth == 0 or rng.random() < 0.4:
        sides = drawn_integer(rng, rng.randint(0, 2)), drawn_integer(rng, rng.randint(0, 2))
        return Term(rng.choice(["less", "less_equal", "equal"]), "bool", sides)
    op = rng.choice(["and", "or", "not", "xor", "where", "equal"])
    return Term(op, "bool", tuple(drawn_condition(rng, depth - 1) for _ in range({"not": 1, "where": 3}.get(op, 2))))


@pytest.mark.parametrize("first", range(4))
def test_bounds_of_drawn_masks(first, count):
    for seed in range(first * 10_000, first * 10_000 + count(60, 2000)):
        rng = random.Random(seed)
        term = drawn_condition(rng, rng.randint(0, 4))
        mask = Function(score_text.text(term), term)
        check_bounds(dataclasses.replace(BASE, mask_mod=mask, window=rng.choice([None, None, 1, 50])))


def test_a_mask_of_many_terms():
    """The intervals stay few and short, and deriving them does not take long."""

    def either(b, h, q, k):
        seen = k < 3
        for number in range(60):
            seen = seen | ((k >= 10 * number) & (k < 10 * number + 5 + h % 2))
        return seen

    check_bounds(dataclasses.replace(BASE, mask_mod=either))


CALLS = [5000, 0, 1, 17, 33, 64, 65, 99, 100, 101, 127, 128, 129, 200, 0, 257, 700, 2049, 3000]
BASES = {
    "sweep": dataclasses.replace(SPECS["bfloat16_HND"], num_heads=32, num_kv_heads=32, head_dim=16),
    "packed": SPECS["bfloat16_packed"],
    "float32": SPECS["float32"],
    "MQA": SPECS["float32_MQA"],
}


@every_pipeline
@pytest.mark.parametrize("name", ["first_and_last", "three", "chunk", "middle", "never", "late", "some_heads"])
@pytest.mark.parametrize("base", BASES)
def test_what_bounds_leave_out_is_not_read(compiled, base, name, pipeline):
    """Ids that would fault stand in the table for blocks outside, and NaN in the keys and values outside."""
    spec = masked(BASES[base], name)
    inputs = make_inputs(spec, CALLS)
    out, lse = compiled(spec, pipeline).decode(*inputs.arguments, None, inputs.out, lse=inputs.lse)
    assert_close_to_oracle(spec, inputs, out, lse)


@every_pipeline
@pytest.mark.parametrize("name", ["first_and_last", "three", "chunk", "middle", "never"])
def test_a_plan_has_the_blocks_that_are_seen(compiled, name, pipeline):
    """Each block once; of the staged pipeline, which takes sequences of a chunk together, no fewer."""
    spec = masked(BASE, name)
    lengths = np.array(CALLS, np.int32)
    width = -(-max(CALLS) // spec.block_size)
    needed, visits = needed_entries(spec, lengths, width), np.zeros((len(CALLS), width), int)
    items = compiled(spec, pipeline).plan(lengths)
    for item in items:
        visits[item.batch_start : item.batch_start + item.num_seqs, item.block_begin : item.block_end] += 1
    for item in items:
        if item.num_seqs == 1 and pipeline == "fused":  # sequences that share an item have the blocks of all of them
            np.testing.assert_array_equal(visits[item.batch_start], needed[item.batch_start])
    assert (visits >= needed).all()
    tokens = np.minimum(spec.block_size, lengths[:, None] - np.arange(width) * spec.block_size)
    read, most = sum(item.num_tokens for item in items), tokens[needed].sum()
    assert most - 2 * spec.block_size * len(CALLS) <= read <= most
