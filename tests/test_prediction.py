"""Predicted times: a call is written down as it was executed, and a core takes as long as its pipes and its order."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pa_compiler.prediction.core import Cache, Sizes, cycles
from pa_compiler.prediction.instructions import FMA, operation
from pa_compiler.prediction.order import lines, readers
from pa_compiler.prediction.trace import Recorder, Trace
from pa_compiler import PagedAttentionSpec
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

PASSES = 400


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


def test_a_call_that_is_written_down(compiled, tmp_path):
    """It has the same bits; its products are those of the call; and its lines are those of the caches."""
    spec = PagedAttentionSpec(8, 2, 64, 16, "float32")
    case = Case(spec, 2, (300, 77), scale=None)
    module = compiled(spec)
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
