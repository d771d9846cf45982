"""Predicted times: a call is written down as it was executed, and a core takes as long as its pipes and its order."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pa_compiler import PagedAttentionSpec
from pa_compiler.prediction import calls
from pa_compiler.prediction.core import Cache, Sizes, cycles
from pa_compiler.prediction.instructions import FMA, operation
from pa_compiler.prediction.order import lines, readers
from pa_compiler.prediction.trace import Recorder, Trace
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

PASSES = 400
SPEC = PagedAttentionSpec(8, 2, 64, 16, "float32")


def looped(*instructions, addresses=()):
    """Cycles of a pass through a loop; addresses(pass) are those of its accesses."""
    steps = [step for number in range(PASSES) for step in (-1, *(addresses(number) if addresses else ()))]
    return sum(cycles(Trace([instructions], [PASSES], steps))) / PASSES


@pytest.mark.parametrize(
    ("sums", "expected"), [(1, 4), (2, 2), (4, 1), (8, 0.5), (12, 0.5)], ids=lambda value: str(value)
)
def test_products_take_their_latency_or_their_pipes(sums, expected):
    code = [f"vfmadd231ps\t%ymm14, %ymm15, %ymm{number % sums}" for number in range(24)]
    assert looped(*code) / len(code) == pytest.approx(expected, rel=0.05)


def test_loads_and_what_is_taken_in_a_cycle():
    assert looped(*["vmovups\t(%rdi), %ymm1"] * 8, addresses=lambda _: [0] * 8) == pytest.approx(4, rel=0.05)
    assert looped(*["nop"] * 19) == pytest.approx(4, rel=0.05)  # six in a cycle, and a jump back ends one


def test_lines_that_are_not_in_the_first_cache_come_one_after_the_other():
    near = looped("vmovups\t(%rdi), %ymm1", addresses=lambda number: [number % 64 * 64])
    far = looped("vmovups\t(%rdi), %ymm1", addresses=lambda number: [number * 64])
    assert near == pytest.approx(1, rel=0.05)
    assert far == pytest.approx(Sizes().fill, rel=0.05)


def test_a_cache_keeps_what_was_used_last():
    cache = Cache(2 * 64 * 4, 2)  # four sets of two lines
    assert [cache.has(line) for line in (0, 4, 0, 8, 0, 4)] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("instruction", "sources", "results"),
    [
        ("vfmadd231ps\t(%rax,%rcx,4), %ymm1, %ymm2", {"a", "c", "v1", "v2"}, {"v2"}),
        ("vaddps\t%ymm1, %ymm2, %ymm3", {"v1", "v2"}, {"v3"}),
        ("vmovups\t%ymm1, 64(%rsp)", {"v1", "sp"}, set()),
        ("addq\t$8, %r10", {"10"}, {"10", "flags"}),
        ("cmpl\t%eax, %r9d", {"a", "9"}, {"flags"}),
        ("jne\t.LBB0_1", {"flags"}, set()),
        ("vxorps\t%xmm1, %xmm1, %xmm1", set(), {"v1"}),
        ("leaq\t8(%rsi,%rdi), %rdx", {"si", "di"}, {"d"}),
        ("prefetcht1\t64(%rbx)", {"b"}, set()),
    ],
)
def test_what_an_instruction_waits_for(instruction, sources, results):
    found = operation(instruction)
    assert (set(found.sources) - {""}, set(found.results)) == (sources, results)


@pytest.mark.parametrize(
    ("fetches", "memory", "whole"), [(True, 64e-9, 464e-9), (False, 64e-9, 400e-9), (False, 640e-9, 840e-9)]
)
def test_core_and_memory_add_up_where_instructions_fetch_and_overlap_else(fetches, memory, whole):
    """Code of two blocks, each of 400 passes of 2 cycles, at 4 GHz: 400 ns, half of them of what reads."""
    products = [f"vfmadd231ps\t%ymm14, %ymm15, %ymm{number % 8}" for number in range(8)]
    steps = [step for _ in range(PASSES) for step in (-1, -2)]
    core = cycles(Trace([products[:4], products[4:]], [PASSES, PASSES], steps))
    assert core == pytest.approx([2 * PASSES, 2 * PASSES], rel=0.01)
    model = calls.Modelled(sum(core), core[0], fetches, 640, np.arange(0, 640, 64), 640)
    assert model.times(4e9, 640 / memory) == pytest.approx((400e-9, memory, whole), rel=0.01)


@pytest.mark.parametrize(
    ("cpu", "knows"),
    [
        (("AuthenticAMD", 25, 1, "AMD EPYC 7763"), True),
        (("AuthenticAMD", 25, 0x50, "AMD Ryzen 7 5800U"), True),
        (("AuthenticAMD", 25, 0x11, "AMD EPYC 9654"), False),
        (("AuthenticAMD", 23, 0x31, "AMD EPYC 7742"), False),
        (("GenuineIntel", 6, 207, "INTEL(R) XEON(R) PLATINUM 8559C"), False),
    ],
    ids=lambda value: str(value),
)
def test_the_cpus_that_the_model_knows(compiled, cpu, knows):
    module, case = compiled(SPEC), Case(SPEC, 2, (300, 77), scale=None)
    vendor, family, number, name = cpu
    info = (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {number}\nmodel name\t: {name}\n\n"
    )
    expected = "" if knows else f"the model knows AMD Zen 3, and not {name}"
    assert calls.unknown(module, case, info) == expected
    if knows:
        attend = Case(SPEC, 1, (300,), scale=None, query_lens=(3,))
        assert calls.unknown(module, attend, info) == "the model is of calls of decode, and not of attend"
        assert "CPU of this machine" in calls.unknown(module, case, "processor\t: 0\n")


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
    at, size = lines(trace, [arrays.key_cache, arrays.value_cache])
    assert size == arrays.key_cache.nbytes + arrays.value_cache.nbytes
    assert len(set(at.tolist())) * 64 == pytest.approx(case.kv_bytes, rel=0.3)
    assert sum(cycles(trace)) > products / 2 / 16 / len(FMA)
    keys, values = (readers(trace, [cache]) for cache in (arrays.key_cache, arrays.value_cache))
    assert keys
    assert values
    assert not keys & values
    assert recorder.trace().counts == [0] * len(trace.blocks)
