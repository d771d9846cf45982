"""Predicted times: a call is written down as it was executed, and read from memory in its order by a probe."""

from __future__ import annotations

import platform
import re

import numpy as np
import pytest

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.prediction import calls
from pa_compiler.prediction.order import Cache, Order, order
from pa_compiler.prediction.rates import Rates
from pa_compiler.prediction.trace import Recorder, Trace
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

SPEC = PagedAttentionSpec(8, 2, 64, 16, "float32")
LOAD, FETCH = "vmovups\t(%rdi), %ymm1", "prefetcht0\t(%rsi)"
SECOND_LEVEL = 1 << 16


def test_a_cache_keeps_what_was_used_last():
    cache = Cache(2 * 64 * 4, 2)  # four sets of two lines
    assert [cache.has(line) for line in (0, 4, 0, 8, 0, 4)] == [False, False, True, False, True, False]


def traced(*blocks, steps):
    """The order of steps on a cache of 64 lines of 64 bytes; they name its bytes."""
    cache = np.zeros(64 * 64, np.uint8)
    at = cache.ctypes.data
    found = [step if step < 0 else at + step for step in steps]
    shift = at % 64
    return order(Trace(blocks, [1] * len(blocks), found), [cache], SECOND_LEVEL), shift


def test_lines_that_are_loaded_again_come_from_memory_once():
    """And of what a block stores and computes, no line of the caches comes."""
    steps = [step for line in (3, 4, 3, 9, 4) for step in (-1, 64 * line, -2)]
    found, shift = traced((LOAD,), ("vaddps\t%ymm1, %ymm2, %ymm3",), steps=steps)
    assert ((found.loaded + shift) // 64).tolist() == [3, 4, 9]
    assert found.fetched is found.loaded
    assert found.size == 64 * 64
    assert found.share == 1 / 2


def test_a_line_that_is_fetched_comes_where_it_is_loaded():
    """Each load stands beside the fetch that is as far ahead as the call's are, in the median: here of four lines."""
    steps = [step for line in range(4) for step in (-2, 64 * line)]
    steps += [step for line in range(56) for step in (-1, 64 * line, 64 * (line + 4))]
    found, shift = traced((LOAD, FETCH), (FETCH,), steps=steps)
    assert ((found.loaded + shift) // 64).tolist() == list(range(56))
    assert ((found.fetched + shift) // 64).tolist() == list(range(4, 60))


def test_the_probe_is_beside_products_and_fetches(monkeypatch):
    """It is asked for as many products as take the seconds, and told whether there are fetches."""
    lines = np.arange(0, 1 << 20, 64)
    rates, asked = Rates(), []
    monkeypatch.setattr(rates, "operations", lambda: 160e9)
    monkeypatch.setattr("pa_compiler.prediction.rates._probes", lambda *what: asked.append(what) or rates._plain)
    of_one = rates._plain.operations()
    for of in (Order(lines, lines, 1 << 20), Order(lines, lines[::-1].copy(), 1 << 20)):
        assert rates.reading(of, 5e-9) > 0
    assert asked == [(round(800 / of_one), False), (round(800 / of_one), True)]


@pytest.mark.parametrize("part", [1, 0.25], ids=["all_lines", "a_part_of_them"])
def test_what_is_predicted_is_of_all_lines_of_the_call(compiled, monkeypatch, part):
    """Where a trace has a part of them only, its time is taken that many times; and what does not read is added."""
    monkeypatch.setattr(calls, "last_level_cache", lambda: 1 << 20)
    case = Case(SPEC, 2, (300, 77), scale=None)
    call, busy = calls.prepared(compiled(SPEC), case), []
    count = int(case.kv_bytes * part) // 64

    class Known:
        def operations(self):
            return 1e9

        def reading(self, of, seconds=0.0):
            busy.append(seconds)
            return 3e-3 if seconds else 1e-3

    lines = np.arange(0, count * 64, 64)
    monkeypatch.setattr(calls, "_seconds", lambda run, before=0: (run(before + 1), (8e-3, 3))[1])
    found = calls.measured(call, Known(), Order(lines, lines, count * 64, 0.75))
    assert found.predicted == pytest.approx((8e-3, 1e-3 / part, 3e-3 / part + 2e-3), rel=0.01)
    assert found[:3] == (8e-3, 12, 1e9)
    assert set(busy) == {0.0, 0.75 * 8e-3 / (case.kv_bytes / 64)}
    assert calls.measured(call, None, None)[2:] == (None, None)


def test_calls_whose_order_is_not_known(compiled, tmp_path, monkeypatch):
    module, case = compiled(SPEC), Case(SPEC, 2, (300, 77), scale=None)
    assert calls.unknown(module, case) == ""
    attend = Case(SPEC, 1, (300,), scale=None, query_lens=(3,))
    assert calls.unknown(module, attend) == "the order of lines is that of calls of decode, and not of attend"
    module.save(tmp_path / "saved.so")
    assert "a loaded module has not" in calls.unknown(pa_compiler.load(tmp_path / "saved.so"), case)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert calls.unknown(module, case).endswith("this machine is aarch64")


def test_a_call_in_the_second_level_cache_has_few_blocks(compiled, monkeypatch):
    """And as many tokens of them as the call."""
    monkeypatch.setattr(calls, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(calls, "second_level_cache", lambda: SECOND_LEVEL)
    case = Case(SPEC, 2, (300, 77), scale=None)
    call = calls.prepared(compiled(SPEC), case)
    table, of_turn = call.near.block_table, call.turns[0].block_table
    assert set(table[table >= 0].tolist()) == {0, 1}  # of 16 KB each: half of the cache
    np.testing.assert_array_equal(table < 0, of_turn < 0)
    cases.compare(call.run_near(), case, call.near, **call.heads)


def test_turns_of_a_call_read_other_blocks(compiled, monkeypatch):
    """And each has the result that it should; sequences of other lengths are not mixed up."""
    monkeypatch.setattr(calls, "last_level_cache", lambda: 1 << 20)
    case = Case(SPEC, 2, (300, 77), scale=None)
    call = calls.prepared(compiled(SPEC), case)
    blocks = [set(turn.block_table[turn.block_table >= 0].tolist()) for turn in call.turns]
    assert len(blocks) == 6
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == len(call.turns[0].key_cache)
    for turn in (0, 5):
        cases.compare(call.run(turn), case, call.turns[turn], **call.heads)


def test_a_call_that_is_written_down(compiled, tmp_path):
    """It has the same bits; its products are those of the call; and its lines are those of the caches."""
    case, module = Case(SPEC, 2, (300, 77), scale=None), compiled(SPEC)
    recorder = Recorder(module, tmp_path)
    arrays = cases.make_inputs(case, 0)
    np.testing.assert_array_equal(cases.call(recorder.module, case, arrays), cases.call(module, case, arrays))
    trace = recorder.trace()
    vectors = {f"%{kind}mm": lanes for kind, lanes in (("x", 4), ("y", 8), ("z", 16))}
    products = sum(
        count * 2 * next(lanes for register, lanes in vectors.items() if register in instruction)
        for count, block in zip(trace.counts, trace.blocks, strict=True)
        for instruction in block
        if re.match(r"vfn?madd\d+ps", instruction)
    )
    assert case.flops <= products < 1.5 * case.flops  # and those of the exponentials
    found = order(trace, [arrays.key_cache, arrays.value_cache], SECOND_LEVEL)
    assert found.size == arrays.key_cache.nbytes + arrays.value_cache.nbytes
    assert len(set(found.loaded.tolist())) * 64 == pytest.approx(case.kv_bytes, rel=0.3)
    assert recorder.trace().counts == [0] * len(trace.blocks)
