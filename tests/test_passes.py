"""The CPU's passes over scheduled TensorIR: buffers as small as what is used of them, statements as they were."""

from __future__ import annotations

import pytest
import tvm
import tvm_ffi
from tvm import s_tir
from tvm.script import tirx as T

from pa_compiler import PagedAttentionSpec, backends, turns
from pa_compiler.cpu import backend, passes, target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.statements import mapped, sblocks


@T.prim_func(s_tir=True)
def numbers(a: T.handle, c: T.handle, n: T.int32):
    first, last = T.match_buffer(a, (64, 64)), T.match_buffer(c, (64, 64))
    with T.sblock("root"):
        between = T.sblock_alloc_buffer((64, 64))
        for i, j in T.grid(64, 64):
            with T.sblock("between"):
                vi, vj = T.axis.remap("SS", [i, j])
                between[vi, vj] = first[vi, vj] + T.float32(1)
        for i, j in T.grid(64, n):
            with T.sblock("last"):
                vi, vj = T.axis.spatial(64, i), T.axis.spatial(64, j)
                last[vi, vj] = between[vi, vj] * T.float32(2)


def compacted(loop):
    """The shape of the buffer between two stages, the first of which is computed in a loop of the second."""
    sch = s_tir.Schedule(tvm.IRModule({"numbers": numbers}))
    sch.work_on("numbers")
    sch.compute_at(sch.get_sblock("between"), sch.get_loops(sch.get_sblock("last"))[loop])
    (function,) = [function for _, function in passes.compaction()(sch.mod).functions.items()]
    (buffer,) = [each for sblock in sblocks(function.body) for each in sblock.alloc_buffers]
    return [int(extent) for extent in buffer.shape]


def test_a_buffer_is_as_small_as_what_is_used_of_it():
    assert compacted(loop=1) == [1, 1]


def test_a_buffer_whose_size_would_depend_on_the_call_stays_as_it_is():
    """In the outer loop n of its elements are used."""
    assert compacted(loop=0) == [64, 64]


@pytest.fixture(scope="module", params=["x86-64-v3", "sapphirerapids"])
def scheduled(request):
    """The scheduled kernels of decode and attend."""
    spec = PagedAttentionSpec(32, 8, 64, 16, "bfloat16", window=100)
    cpu = target.resolve(backends.normalize({"kind": "llvm", "mcpu": request.param}))
    tiles, of_attend = tiling.choose(spec, cpu, "fused"), tiling.choose_attend(spec, cpu, "fused")
    with turns.using_tvm():
        return backend.lower(backend.build_kernels(spec, tiles, "fused", of_attend), spec, tiles, of_attend).mod


def test_a_statement_of_its_own_parts_is_the_same(scheduled):
    def same(statement):
        return mapped(statement, same)

    for function in scheduled.functions.values():
        assert tvm_ffi.structural_equal(same(function.body), function.body)


def test_all_sblocks_are_found(scheduled):
    for variable, function in scheduled.functions.items():
        text = tvm.IRModule({variable: function}).script()
        assert len([*sblocks(function.body)]) == text.count("with T.sblock(") + ('T.sblock("root")' not in text)


def test_buffers_of_kernels_have_sizes_that_no_call_changes(scheduled):
    """Of what schedules put into loops too: a buffer of the call's size would be allocated anew in each iteration."""
    functions = passes.compaction()(scheduled).functions.values()
    buffers = [buffer for each in functions for sblock in sblocks(each.body) for buffer in sblock.alloc_buffers]
    assert len(buffers) > 20
    assert [buffer.name for buffer in buffers if not passes._size(buffer)] == []
