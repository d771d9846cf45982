"""The functions of pa_compiler.integrations.relax by themselves: what TVM calls them with, and what they refuse."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import tvm

from pa_compiler import PagedAttentionSpec, reference
from pa_compiler.integrations.relax import kv_cache_functions

SPEC = PagedAttentionSpec(8, 2, 64, 16, "float32", kv_layout="HND", window=24)
LENS = [20, 0, 33]
"""Tokens in the pages of three sequences."""

INDPTR, INDICES = [0, 2, 2, 5], [3, 6, 0, 5, 1]
LAST = [4, 0, 1]
SCALE = 0.11


@functools.cache
def functions():
    return kv_cache_functions(SPEC)


def offset_view(values):
    """A tensor of TVM that begins inside of another one, as those of TVM's page tables do. NaN, or -7, is before it."""
    values = np.ascontiguousarray(values)
    before = np.full(6, np.nan if values.dtype.kind == "f" else -7, values.dtype)
    whole = tvm.runtime.tensor(np.concatenate([before, values.ravel(), before]))
    return whole._create_view(values.shape, str(values.dtype), 6 * values.itemsize)


class Call:
    """Arrays of a call over pages, and their tensors."""

    def __init__(self, counts, seed=0):
        rng = np.random.default_rng(seed)
        self.starts = np.append(0, np.cumsum(counts))
        self.pages = rng.standard_normal((8, 2, 2, 16, 64)).astype(np.float32)
        self.pages[[2, 4, 7]] = np.nan  # of no sequence
        self.pages[6, :, :, 4:] = self.pages[1, :, :, 1:] = np.nan  # beyond their ends
        self.query = rng.standard_normal((self.starts[-1], 8, 64)).astype(np.float32)
        self.out = tvm.runtime.tensor(np.full(self.query.shape, np.nan, np.float32))
        self.lse = tvm.runtime.tensor(np.full(self.query.shape[:2], np.nan, np.float32))

    def table(self, info=LAST):
        return [offset_view(np.array(each, np.int32)) for each in (INDPTR, INDICES, info)]

    def positions(self):
        return [offset_view(np.zeros(len(LENS), np.int32)), offset_view(np.zeros(len(self.query), np.int32))]

    def check(self, seen):
        """Compare with the reference: seen(sequence, row) is which of its tokens a query token sees."""
        out, lse = self.out.numpy(), self.lse.numpy()
        for seq, (begin, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            blocks = self.pages[INDICES[INDPTR[seq] : INDPTR[seq + 1]]]
            keys, values = (blocks[:, part].transpose(0, 2, 1, 3).reshape(-1, 2, 64)[: LENS[seq]] for part in (0, 1))
            for row in range(end - begin):
                of_row = np.flatnonzero(seen(seq, row))
                expected = attended(self.query[begin + row], keys[of_row], values[of_row])
                assert np.abs(out[begin + row] - expected[0]).max() < 1e-5
                assert np.allclose(lse[begin + row], expected[1], rtol=1e-5, atol=2e-5)


def attended(query, keys, values):
    """out and lse, base 2, of one query token over keys [n, 2, 64]; by the reference."""
    caches = keys[None], values[None]
    table, lens = np.zeros((1, 1), np.int32), np.array([len(keys)])
    if not len(keys):
        return np.zeros((8, 64)), np.full(8, -np.inf)
    out, lse = reference.decode(query[None], *caches, table, lens, scale=SCALE, return_lse=True)
    return out[0], lse[0] / math.log(2)


ROPE = (0, 1.0, 1e4, SCALE)


def test_decode():
    call = Call([1, 1, 1])
    functions().attention_decode(
        offset_view(call.query), offset_view(call.pages), *call.table(), *call.positions(), call.out, call.lse, *ROPE
    )
    call.check(lambda seq, row: np.ones(LENS[seq], bool))


INFO = [LAST, [9, 0, 20], [3, 0, 5]]
"""With windows: from positions 9 and 20 on, behind attention sinks of 3 and 5 tokens."""


def kept(seq):
    position = np.arange(LENS[seq])
    return (position < INFO[2][seq]) | (position >= INFO[1][seq])


def test_decode_in_windows():
    call = Call([1, 1, 1])
    call.pages[3, :, :, 3:9] = np.nan  # between the first sequence's sink and its window
    functions().attention_decode_sliding_window(
        offset_view(call.query),
        offset_view(call.pages),
        *call.table(INFO),
        *call.positions(),
        call.out,
        call.lse,
        *ROPE,
    )
    call.check(lambda seq, row: kept(seq))


COUNTS = [[3, 2, 1], [70, 0, 5], [1, 40, 100], [0, 0, 2], [20, 1, 33]]
"""Query tokens, which may be more than the tokens that they attend to."""


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_prefill_after_the_pages(counts):
    call = Call(counts)
    starts = offset_view(call.starts.astype(np.int32))
    functions().attention_prefill(
        offset_view(call.query), starts, offset_view(call.pages), *call.table(), *call.positions(),
        call.out, call.lse, 0, *ROPE,
    )  # fmt: skip
    call.check(lambda seq, row: np.ones(LENS[seq], bool))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("causal", [0, 1])
def test_prefill_in_windows(counts, causal):
    call, info = Call(counts), np.array(INFO) * [[1], [1], [1 - causal]]
    starts = offset_view(call.starts.astype(np.int32))
    functions().attention_prefill_sliding_window(
        offset_view(call.query), starts, offset_view(call.pages), *call.table(info), *call.positions(),
        call.out, call.lse, causal, *ROPE,
    )  # fmt: skip

    def seen(seq, row):
        position = np.arange(LENS[seq])
        if not causal:
            return kept(seq)
        return (position >= INFO[1][seq]) & (position > LENS[seq] + row - SPEC.window)

    call.check(seen)


def test_causal_prefill_of_the_last_tokens_of_the_pages():
    call = Call([20, 0, 7])
    starts = offset_view(call.starts.astype(np.int32))
    functions().attention_prefill(
        offset_view(call.query), starts, offset_view(call.pages), *call.table(), *call.positions(),
        call.out, call.lse, 1, *ROPE,
    )  # fmt: skip
    call.check(lambda seq, row: np.arange(LENS[seq]) <= LENS[seq] - np.diff(call.starts)[seq] + row)


def test_nothing_in_the_pages():
    call = Call([2, 1, 0])
    table = [offset_view(np.array(each, np.int32)) for each in ([0] * 4, [], [0] * 3)]
    starts = offset_view(call.starts.astype(np.int32))
    arrays = (offset_view(call.query), starts, offset_view(call.pages), *table, *call.positions())
    functions().attention_prefill(*arrays, call.out, call.lse, 0, *ROPE)
    assert (call.out.numpy() == 0).all()
    assert (call.lse.numpy() == -np.inf).all()


@pytest.mark.parametrize("causal", [0, 1])
def test_ragged_prefill_of_other_lengths_of_keys(causal):
    rng, counts, lens = np.random.default_rng(1), [3, 0, 5, 1], [9, 4, 5, 17]
    starts, ends = (np.append(0, np.cumsum(each)).astype(np.int32) for each in (counts, lens))
    query = rng.standard_normal((9, 8, 64)).astype(np.float32)
    keys, values = rng.standard_normal((2, 35, 2, 64)).astype(np.float32)
    out, lse = tvm.runtime.empty(query.shape, "float32"), tvm.runtime.empty(query.shape[:2], "float32")
    positions = offset_view(np.zeros(9, np.int32)), offset_view(np.zeros(4, np.int32))
    functions().attention_prefill_ragged(
        offset_view(query), offset_view(starts), offset_view(keys), offset_view(values), offset_view(ends), *positions,
        out, lse, causal, *ROPE,
    )  # fmt: skip
    for seq, count in enumerate(counts):
        for row in range(count):
            end = ends[seq + 1] - (count - 1 - row if causal else 0)
            at = starts[seq] + row
            expected = attended(query[at], keys[ends[seq] : end], values[ends[seq] : end])
            assert np.abs(out.numpy()[at] - expected[0]).max() < 1e-5
            assert np.abs(lse.numpy()[at] - expected[1]).max() < 1e-5


def test_merging_in_place():
    rng = np.random.default_rng(2)
    outs = rng.standard_normal((2, 5, 8, 64)).astype(np.float32)
    lses = (100 * rng.standard_normal((2, 5, 8))).astype(np.float32)
    lses[0, 1], lses[1, 2], lses[:, 3] = -np.inf, -np.inf, -np.inf
    outs[0, 1], outs[:, 3] = np.nan, np.nan
    given = [tvm.runtime.tensor(each.copy()) for pair in zip(outs, lses, strict=True) for each in pair]
    functions().merge_state_inplace(*given)
    weights = np.exp2(lses - np.where(lses.max(axis=0) == -np.inf, 0, lses.max(axis=0)).astype(np.float64))
    total = weights.sum(axis=0)
    expected = (weights[..., None] * np.nan_to_num(outs)).sum(axis=0) / np.where(total, total, 1)[..., None]
    assert np.abs(given[0].numpy() - expected).max() < 1e-5
    with np.errstate(divide="ignore"):
        assert np.allclose(given[1].numpy(), np.log2(total) + lses.max(axis=0), rtol=1e-6, atol=1e-5)


def test_pages_are_copied_and_compacted():
    call = Call([1, 1, 1])
    pages = offset_view(call.pages)
    functions().copy_single_page(pages, 3, 2, 5)
    moves = [[3 * 16 + 7, 3 * 16 + 9, 5 * 16 + 2], [3 * 16 + 6, 3 * 16 + 7, 1 * 16 + 15]]
    expected = call.pages.copy()
    expected[2, :, :, :5] = expected[3, :, :, :5]
    for source, target in zip(*moves, strict=True):
        expected[target // 16, :, :, target % 16] = expected[source // 16, :, :, source % 16]
    indptr = offset_view(np.array([0, 2, 3], np.int32))
    functions().compact_copy(pages, indptr, offset_view(np.array(moves, np.int32)), 2)
    assert np.array_equal(pages.numpy(), expected, equal_nan=True)


def test_what_is_not_covered_is_refused_by_name():
    call, inline = Call([1, 1, 1]), (1, 1.0, 1e4, SCALE)
    starts, order = offset_view(call.starts.astype(np.int32)), offset_view(np.zeros((0, 2), np.int32))
    arrays = (offset_view(call.query), starts, offset_view(call.pages), *call.table(), *call.positions())
    made = functions()
    with pytest.raises(ValueError, match="rotary_mode: expected 0 in attention of token trees"):
        made.attention_prefill_with_tree_mask_paged_kv(*arrays, call.out, call.lse, *inline, starts, order)
    sliding = (*arrays[:3], *call.table(INFO), *call.positions(), call.out, call.lse, 1)
    with pytest.raises(ValueError, match="length_info: expected no attention sinks"):
        made.attention_prefill_sliding_window(*sliding, *ROPE)
    with pytest.raises(ValueError, match="rotary_mode: expected 0 in layers of the kind MHA_SLIDING"):
        made.attention_prefill_sliding_window(*sliding, *inline)
    pages = tvm.runtime.empty((8, 2, 2, 8, 64), "float32")
    with pytest.raises(ValueError, match=r"pages: expected \[num_pages, 2, 2, 16, 64\], got \[8, 2, 2, 8, 64\]"):
        made.attention_decode(arrays[0], pages, *arrays[3:], call.out, call.lse, *ROPE)
    assert np.isnan(call.out.numpy()).all()
